//! What a test may leave behind on the machine: namespaces, control groups, mounts, directories, processes. Only looks;
//! removes nothing.
//!
//! The harness puts the id of the test's process into every name (`shunt-TEST-pID-NUMBER`), so what belongs to a run that
//! still goes on, ours or another's, is told from what nobody will clean up.

use std::{collections::BTreeSet, fs, path::Path};

/// The beginning of every name that the harness gives to something that outlives a process.
const PREFIX: &str = "shunt-";

/// The things now there that belong to no running test, each as a line for a reader.
pub fn look() -> BTreeSet<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut found: BTreeSet<_> =
        names(Path::new("/run/netns")).map(|name| format!("network namespace {name}")).collect();
    for root in mount_points(&mounts, "cgroup2") {
        found.extend(names(Path::new(root)).map(|name| format!("control group {root}/{name}")));
    }
    let bpf = mount_points(&mounts, "bpf").filter(|dir| dir.contains(PREFIX));
    found.extend(bpf.map(|dir| format!("BPF file system mounted at {dir}")));
    let temporary = std::env::temp_dir();
    found.extend(names(&temporary).map(|name| format!("directory {}/{name}", temporary.display())));
    found.extend(processes());
    found.retain(|line| owner(line).is_none_or(|pid| !is_running(pid)));
    found
}

fn names(dir: &Path) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(|name| name.starts_with(PREFIX))
}

fn mount_points<'a>(mounts: &'a str, kind: &str) -> impl Iterator<Item = &'a str> {
    mounts.lines().filter_map(move |line| {
        let mut fields = line.split(' ').skip(1);
        let dir = fields.next()?;
        (fields.next()? == kind).then_some(dir)
    })
}

/// The processes whose command line names something of a test.
fn processes() -> impl Iterator<Item = String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        owner(&line).map(|_| format!("process {pid}: {}", line.trim()))
    })
}

/// The process id in the first name that the harness gave.
fn owner(text: &str) -> Option<u32> {
    text.match_indices(PREFIX).find_map(|(at, _)| {
        let mut fields = text[at + PREFIX.len()..].split('-').skip(1);
        fields.next()?.strip_prefix('p')?.parse().ok()
    })
}

fn is_running(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_told_apart_by_type() {
        let mounts =
            "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\nbpf /tmp/shunt-a-p7-0/x bpf rw 0 0\nt /t tmpfs rw 0 0\n";
        assert_eq!(mount_points(mounts, "cgroup2").collect::<Vec<_>>(), ["/sys/fs/cgroup/unified"]);
        assert_eq!(mount_points(mounts, "bpf").collect::<Vec<_>>(), ["/tmp/shunt-a-p7-0/x"]);
    }

    #[test]
    fn owner_is_read_from_the_harness_names_and_no_others() {
        assert_eq!(owner("network namespace shunt-routed.tcp-p123-0-node"), Some(123));
        assert_eq!(owner("process 5: /t/shunt-probe --bpffs /tmp/shunt-a-p77-1/bpf"), Some(77));
        assert_eq!(owner("network namespace shunt-mine"), None);
        assert_eq!(owner("directory /tmp/shunt-xtask-build-1"), None);
    }
}
