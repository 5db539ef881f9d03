//! Limits and timeouts of the kernel's connection tracking, as kube-proxy's configuration asks for them.
//!
//! Shunt itself needs none of them and does not switch connection tracking on; nor does writing them. They are for what else
//! uses it on this node, which a kube-proxy may have served so far. What is not asked for is left alone, and what the kernel
//! refuses is told and no reason not to start (a container, a network namespace other than the first, no connection tracking).
//! May touch: /proc/sys/net/netfilter, and the size of its hash table.

use std::fs;
use std::io;
use std::time::Duration;

use proxy_common::lb::flow::lifetime;
use tracing::{info, warn};

use super::reserve;

/// What is asked for; nothing by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Connections for each CPU that is online.
    pub max_per_core: Option<u32>,
    /// Connections at least, where there is a number for each CPU.
    pub min: u32,
    /// Of a TCP connection without packets.
    pub tcp_established: Option<Duration>,
    /// Of one that one side has closed.
    pub tcp_close_wait: Option<Duration>,
    /// Segments outside of the window are no reason to call a packet invalid.
    pub tcp_be_liberal: bool,
    /// Of datagrams without answer.
    pub udp: Option<Duration>,
    /// Of datagrams with answers.
    pub udp_stream: Option<Duration>,
}

/// Above that, kube-proxy 1.36 does not go, however many CPUs there are.
const MOST: u64 = 1 << 20;
/// Connections for each bucket of the hash table, as kube-proxy has it.
const PER_BUCKET: u32 = 4;

const DIRECTORY: &str = "/proc/sys/net/netfilter";
const BUCKETS: &str = "/sys/module/nf_conntrack/parameters/hashsize";

const MAX: &str = "nf_conntrack_max";
const TCP_ESTABLISHED: &str = "nf_conntrack_tcp_timeout_established";
const TCP_CLOSE_WAIT: &str = "nf_conntrack_tcp_timeout_close_wait";
const TCP_BE_LIBERAL: &str = "nf_conntrack_tcp_be_liberal";
const UDP: &str = "nf_conntrack_udp_timeout";
const UDP_STREAM: &str = "nf_conntrack_udp_timeout_stream";

impl Wanted {
    /// The most connections, on so many CPUs.
    fn max(&self, cpus: usize) -> Option<u32> {
        let scaled = u64::from(self.max_per_core?) * cpus as u64;
        let max = if scaled > MOST { MOST } else { scaled.max(self.min.into()) };
        u32::try_from(max).ok()
    }

    fn timeouts(&self) -> [(&'static str, Option<Duration>, u32); 4] {
        [
            (TCP_ESTABLISHED, self.tcp_established, lifetime::TCP_ESTABLISHED),
            (TCP_CLOSE_WAIT, self.tcp_close_wait, lifetime::TCP_HALF_CLOSED),
            (UDP, self.udp, lifetime::UDP_OPENING),
            (UDP_STREAM, self.udp_stream, lifetime::UDP_ANSWERED),
        ]
    }

    /// Names and values, in the order in which they are written.
    fn settings(&self, cpus: usize) -> Vec<(&'static str, u64)> {
        let max = self.max(cpus).map(|max| (MAX, u64::from(max)));
        let timeouts = self.timeouts().into_iter().filter_map(|(name, time, _)| Some((name, time?.as_secs())));
        let liberal = self.tcp_be_liberal.then_some((TCP_BE_LIBERAL, 1));
        max.into_iter().chain(timeouts).chain(liberal).collect()
    }

    /// Timeouts below those of Shunt's own flows, with these: the kernel forgets a connection that Shunt still translates.
    fn too_short(&self) -> Vec<(&'static str, u64, u32)> {
        let timeouts = self.timeouts().into_iter().filter_map(|(name, time, ours)| Some((name, time?.as_secs(), ours)));
        timeouts.filter(|(_, seconds, ours)| *seconds < u64::from(*ours)).collect()
    }
}

/// Writes what is asked for.
pub fn apply(wanted: &Wanted) {
    let cpus = aya::util::online_cpus().map_or(1, |cpus| cpus.len());
    for (name, value) in wanted.settings(cpus) {
        let path = format!("{DIRECTORY}/{name}");
        let result = set(&path, value);
        match &result {
            Ok(false) => {}
            Ok(true) => info!(path, value, "set as the configuration asks"),
            Err(error) => warn!(path, value, %error, "cannot be set as the configuration asks; it stays as it is"),
        }
        if name == MAX && result.is_ok() {
            grow_buckets(value);
        }
    }
    for (name, seconds, ours) in wanted.too_short() {
        warn!(
            name,
            seconds,
            ours,
            "the kernel will forget connections earlier than shunt does: those that are silent for longer may break"
        );
    }
}

/// Sees to it that the hash table is large enough. It is the whole machine's.
fn grow_buckets(max: u64) {
    let buckets = max / u64::from(PER_BUCKET);
    let known = fs::read_to_string(BUCKETS).ok().and_then(|text| text.trim().parse::<u64>().ok());
    if known.is_none_or(|known| known >= buckets) {
        return;
    }
    match fs::write(BUCKETS, buckets.to_string()) {
        Ok(()) => info!(path = BUCKETS, buckets, "set as the configuration asks"),
        Err(error) => warn!(path = BUCKETS, buckets, %error, "cannot be set: look-ups of connections may take longer"),
    }
}

/// Writes a number if it is another one. True if it was.
fn set(path: &str, value: u64) -> io::Result<bool> {
    let text = value.to_string();
    if fs::read_to_string(path)?.trim() == text {
        return Ok(false);
    }
    reserve::write_setting(path, &text).map(|()| true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_asked_for_is_left_alone() {
        assert!(Wanted::default().settings(8).is_empty());
        assert!(Wanted { min: 7, ..Wanted::default() }.settings(8).is_empty(), "as kube-proxy with maxPerCore 0");
    }

    #[test]
    fn the_limit_follows_the_cpus_between_two_bounds() {
        let max = |per_core, min, cpus| Wanted { max_per_core: Some(per_core), min, ..Wanted::default() }.max(cpus);
        assert_eq!(max(32_768, 131_072, 2), Some(131_072));
        assert_eq!(max(32_768, 131_072, 8), Some(262_144));
        assert_eq!(max(32_768, 131_072, 128), Some(1 << 20));
        assert_eq!(max(u32::MAX, 0, 128), Some(1 << 20));
        assert_eq!(max(1, 2_000_000, 1), Some(2_000_000), "what is asked for as the least is not cut");
    }

    #[test]
    fn all_that_is_asked_for_is_written() {
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let wanted = Wanted {
            max_per_core: Some(10),
            min: 5,
            tcp_established: seconds(86_400),
            tcp_close_wait: seconds(3600),
            tcp_be_liberal: true,
            udp: seconds(20),
            udp_stream: seconds(180),
        };
        let expected = [
            (MAX, 20),
            (TCP_ESTABLISHED, 86_400),
            (TCP_CLOSE_WAIT, 3600),
            (UDP, 20),
            (UDP_STREAM, 180),
            (TCP_BE_LIBERAL, 1),
        ];
        assert_eq!(wanted.settings(2), expected);
        assert_eq!(wanted.too_short(), [(UDP, 20, lifetime::UDP_OPENING)]);
    }
}
