//! What no package brings: a kernel that is new enough, and control groups. Reads /proc; changes nothing.

use std::fs;

use anyhow::{Context as _, Result, bail};

/// The oldest kernel that the programs are written for.
const OLDEST_KERNEL: (u32, u32) = (6, 1);

/// The machine can run the programs and the suites.
///
/// Errors: it cannot; the text says what is missing.
pub fn ensure() -> Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("this is not Linux")?;
    if kernel_version(&release).is_some_and(|version| version < OLDEST_KERNEL) {
        let (major, minor) = OLDEST_KERNEL;
        bail!("Linux {} is too old for the programs: {major}.{minor} or newer is needed", release.trim());
    }
    let mounts = fs::read_to_string("/proc/self/mounts").context("the mount table cannot be read")?;
    if !mounts.lines().any(|line| line.split(' ').nth(2) == Some("cgroup2")) {
        bail!(
            "control groups version 2 are not mounted; please type: \
             sudo mkdir -p /sys/fs/cgroup/unified && sudo mount -t cgroup2 none /sys/fs/cgroup/unified"
        );
    }
    Ok(())
}

/// The first two numbers of a kernel's release.
fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions_compare_as_numbers() {
        assert_eq!(kernel_version("6.18.2-cloud-amd64\n"), Some((6, 18)));
        assert_eq!(kernel_version("5.10.0-9-amd64"), Some((5, 10)));
        assert!((5, 19) < OLDEST_KERNEL && (6, 18) > OLDEST_KERNEL);
        assert_eq!(kernel_version("strange"), None);
    }
}
