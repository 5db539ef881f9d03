//! What a test may leave behind on the machine: namespaces, control groups, mounts, processes. Only looks; removes nothing.

use std::{collections::BTreeSet, fs, path::Path};

/// The beginning of every name that the harness gives to something that outlives a process.
const PREFIX: &str = "shunt-";

/// The things now there that a test could have made, each as a line for a reader.
pub fn look() -> BTreeSet<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut found: BTreeSet<_> = names(Path::new("/run/netns"))
        .map(|name| format!("network namespace {name}"))
        .collect();
    for root in cgroup_roots(&mounts) {
        found.extend(names(Path::new(root)).map(|name| format!("control group {root}/{name}")));
    }
    found.extend(bpf_mounts(&mounts).map(|dir| format!("BPF file system mounted at {dir}")));
    found.extend(agents());
    found
}

fn names(dir: &Path) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(PREFIX))
}

/// The mount points of control groups version 2.
fn cgroup_roots(mounts: &str) -> impl Iterator<Item = &str> {
    mount_points(mounts, "cgroup2")
}

/// The mount points of BPF file systems that a test made.
fn bpf_mounts(mounts: &str) -> impl Iterator<Item = &str> {
    mount_points(mounts, "bpf").filter(|dir| dir.contains(PREFIX))
}

fn mount_points<'a>(mounts: &'a str, kind: &str) -> impl Iterator<Item = &'a str> {
    mounts.lines().filter_map(move |line| {
        let mut fields = line.split(' ').skip(1);
        let dir = fields.next()?;
        (fields.next()? == kind).then_some(dir)
    })
}

/// The agents of this build that are running. Test runs must not overlap; another's agent is another's file.
fn agents() -> impl Iterator<Item = String> {
    let shunt = crate::workspace::shunt();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(move |entry| {
        let exe = fs::read_link(entry.path().join("exe")).ok()?;
        (exe == shunt).then(|| format!("process {} ({})", entry.file_name().to_string_lossy(), exe.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_told_apart_by_type_and_name() {
        let mounts = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\nbpf /sys/fs/bpf bpf rw 0 0\n\
                      bpf /run/shunt-x/bpf bpf rw 0 0\ntmpfs /run/shunt-y tmpfs rw 0 0\n";
        assert_eq!(cgroup_roots(mounts).collect::<Vec<_>>(), ["/sys/fs/cgroup/unified"]);
        assert_eq!(bpf_mounts(mounts).collect::<Vec<_>>(), ["/run/shunt-x/bpf"]);
    }
}
