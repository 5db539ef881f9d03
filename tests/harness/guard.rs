//! Guards: nothing is left when they go, also after a panic; children do not outlive the thread that wants them.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use shunt_tests::bed::Bed;
use shunt_tests::cgroup::Cgroup;
use shunt_tests::netns::Netns;
use shunt_tests::place::Place;
use shunt_tests::process::{Command, Process};

/// One of each thing that outlives a process, and a process in them.
struct Everything {
    process: Process,
    place: Place,
    bed: std::sync::Arc<Bed>,
}

impl Everything {
    fn make() -> Self {
        let bed = Bed::new();
        bed.bpffs("bpf");
        let parent = Cgroup::new(&bed, "parent");
        let place = Place::new("x", Netns::new(&bed, "x"), Some(parent.child("child")));
        let mut command = place.command("cat");
        command.args(["/proc/self/cgroup", "-"]);
        Self { process: Process::start("cat", command), place, bed }
    }

    fn paths(&self) -> Vec<PathBuf> {
        let cgroup = self.place.cgroup().expect("it was given one").dir();
        let parent = cgroup.parent().expect("a child has a parent").to_owned();
        let process = PathBuf::from(format!("/proc/{}", self.process.id()));
        vec![
            process,
            self.place.ns().path(),
            cgroup.to_owned(),
            parent,
            self.bed.dir().join("bpf"),
            self.bed.dir().to_owned(),
        ]
    }
}

fn is_mounted(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("the mount table can be read");
    mounts.lines().any(|line| line.split(' ').nth(1) == path.to_str())
}

fn assert_gone(paths: &[PathBuf]) {
    for path in paths {
        assert!(!path.exists() && !is_mounted(path), "{} is left", path.display());
    }
}

#[test]
fn everything_goes_with_its_guards() {
    let all = Everything::make();
    let paths = all.paths();
    assert!(paths.iter().all(|path| path.exists()), "{paths:?}");
    assert!(is_mounted(&all.place.ns().path()) && is_mounted(&all.bed.dir().join("bpf")));
    let group = all.place.cgroup().expect("it was given one").dir().to_owned();
    all.process.wait_line(0, "its control group", |line| group.ends_with(line.strip_prefix("0::/")?).then_some(()));
    drop(all);
    assert_gone(&paths);
}

#[test]
fn nothing_is_left_after_a_panic() {
    let mut paths = Vec::new();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let all = Everything::make();
        paths = all.paths();
        panic!("on purpose");
    }));
    assert!(outcome.is_err());
    assert_eq!(paths.len(), 6);
    assert_gone(&paths);
}

#[test]
fn a_process_outlives_the_thread_that_started_it() {
    let start = || Process::start("cat", Command::new("cat"));
    let mut process = std::thread::spawn(start).join().expect("starting does not panic");
    process.send_line("hello");
    process.wait_line(0, "an echo", |line| (line == "hello").then_some(()));
    assert!(process.wait().success());
}

#[test]
fn a_namespace_has_no_way_out() {
    let bed = Bed::new();
    let ns = Netns::new(&bed, "x");
    let error =
        ns.run(|| std::net::UdpSocket::bind("0.0.0.0:0")?.send_to(b"x", "192.0.2.1:9")).expect_err("there is no route");
    assert_eq!(error.raw_os_error(), Some(nix::libc::ENETUNREACH));
    assert_eq!(ns.output(["ip", "-o", "link"]).lines().count(), 1, "only lo");
}

#[test]
fn a_panic_inside_a_namespace_is_the_tests_own() {
    let bed = Bed::new();
    let ns = Netns::new(&bed, "x");
    let outcome = catch_unwind(AssertUnwindSafe(|| ns.run(|| panic!("on purpose"))));
    let message = outcome.expect_err("it panicked").downcast::<&str>().expect("it is the text");
    assert_eq!(*message, "on purpose");
}
