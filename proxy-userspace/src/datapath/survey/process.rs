//! Processes that the socket hooks do not see, since their control group is not below the hooked one.
//!
//! May touch: /proc, for reading.

use std::fs;
use std::path::{Path, PathBuf};

use super::hook::Sockets;
use super::{Seen, Unseen, read};

/// A process outside the hooked control group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Process id.
    pub id: u32,
    /// Name of its program.
    pub name: String,
    /// Its control group, as /proc/PID/cgroup names it.
    pub group: String,
    /// It is in this network namespace.
    pub is_of_node: bool,
}

/// All of them that can be seen from here, this process among them. Threads of the kernel are left out.
pub(super) fn outside(sockets: &Sockets) -> Seen<Vec<Process>> {
    let Some(hooked) = &sockets.hooked else { return Err(Unseen("the socket hooks are on no control group".into())) };
    if hooked.is_root() {
        return Ok(Vec::new());
    }
    let Some(path) = &hooked.path else { return Err(Unseen("the hooked control group cannot be found".into())) };
    let entries = fs::read_dir("/proc").map_err(|error| Unseen(format!("processes cannot be listed: {error}")))?;
    let own_network = network(Path::new("/proc/self"));
    let processes = entries.flatten().filter_map(|entry| {
        let id = entry.file_name().to_str()?.parse().ok()?;
        let directory = entry.path();
        let group = parse_group(&read(directory.join("cgroup"))?)?.to_owned();
        let (name, is_of_users) = parse_stat(&read(directory.join("stat"))?)?;
        let is_wanted = is_of_users && !is_below(&group, path);
        let is_of_node = network(&directory) == own_network;
        is_wanted.then_some(Process { id, name, group, is_of_node })
    });
    let mut processes: Vec<_> = processes.collect();
    processes.sort_by_key(|process| (!process.is_of_node, process.id));
    Ok(processes)
}

fn network(process: &Path) -> Option<PathBuf> {
    fs::read_link(process.join("ns/net")).ok()
}

/// The group of version 2 in the text of /proc/PID/cgroup.
fn parse_group(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::"))
}

fn is_below(group: &str, hooked: &str) -> bool {
    hooked == "/" && !group.starts_with("/..")
        || group.strip_prefix(hooked).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Name of a process, and whether it is one of users' and lives, from /proc/PID/stat (proc_pid_stat(5)).
fn parse_stat(stat: &str) -> Option<(String, bool)> {
    /// include/linux/sched.h
    const PF_KTHREAD: u64 = 0x0020_0000;
    let (head, tail) = stat.rsplit_once(") ")?;
    let (_, name) = head.split_once(" (")?;
    let fields: Vec<_> = tail.split(' ').collect();
    let flags: u64 = fields.get(6)?.parse().ok()?;
    Some((name.to_owned(), flags & PF_KTHREAD == 0 && !matches!(fields[0], "Z" | "X")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_below_is_a_whole_name_below() {
        assert!(is_below("/pods/a", "/pods") && is_below("/pods", "/pods") && is_below("/x", "/"));
        assert!(!is_below("/podsx", "/pods") && !is_below("/", "/pods") && !is_below("/../x", "/"));
        assert_eq!(parse_group("1:cpu:/x\n0::/pods/a\n"), Some("/pods/a"));
    }

    #[test]
    fn threads_of_the_kernel_and_the_dead_are_told_apart() {
        let stat = |state: &str, flags: u64| format!("7 (a) (b) {state} 1 7 7 0 -1 {flags} 0 0");
        assert_eq!(parse_stat(&stat("S", 0x0040_0000)), Some(("a) (b".to_owned(), true)));
        assert_eq!(parse_stat(&stat("S", 0x0020_0040)).map(|(_, lives)| lives), Some(false));
        assert_eq!(parse_stat(&stat("Z", 0)).map(|(_, lives)| lives), Some(false));
    }
}
