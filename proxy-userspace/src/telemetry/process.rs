//! This process as metrics, under the names that every Prometheus client uses, and what was built into it.
//!
//! May touch: /proc of this process, for reading.

use std::fmt;
use std::fs;
use std::time::SystemTime;

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use nix::sys::time::TimeValLike as _;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use proxy_common::abi::ABI_VERSION;

/// Reads what the process uses whenever metrics are asked for.
#[derive(Debug)]
struct Process {
    /// Seconds since 1970.
    started: f64,
}

/// Makes metrics of the process known; it counts as started now.
pub fn register(registry: &mut Registry) {
    let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    registry.sub_registry_with_prefix("process").register_collector(Box::new(Process { started }));
    let labels = [("version", env!("CARGO_PKG_VERSION").to_owned()), ("layout", ABI_VERSION.to_string())];
    let shunt = registry.sub_registry_with_prefix("shunt");
    let labels = labels.into_iter().map(|(key, value)| (key.into(), value.into()));
    let build = shunt.sub_registry_with_labels(labels);
    build.register("build_info", "What runs: 1 with the labels of this build", ConstGauge::new(1u64));
}

impl Collector for Process {
    /// What cannot be read is left out.
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        if let Some(seconds) = cpu_seconds() {
            let help = "User and system CPU time spent in seconds";
            let metric = encoder.encode_descriptor("cpu_seconds", help, None, MetricType::Counter)?;
            ConstCounter::new(seconds).encode(metric)?;
        }
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let open_files_limit = getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _)| soft as f64);
        let gauges = [
            ("resident_memory_bytes", "Resident memory size in bytes", status_bytes(&status, "VmRSS:")),
            ("virtual_memory_bytes", "Virtual memory size in bytes", status_bytes(&status, "VmSize:")),
            ("open_fds", "Number of open file descriptors", open_files()),
            ("max_fds", "Maximum number of open file descriptors", open_files_limit),
            ("start_time_seconds", "Start time of the process since 1970 in seconds", Some(self.started)),
        ];
        for (name, help, value) in gauges {
            let Some(value) = value else { continue };
            ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        Ok(())
    }
}

fn cpu_seconds() -> Option<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    let used = usage.user_time() + usage.system_time();
    Some(used.num_microseconds() as f64 / 1e6)
}

/// `VmRSS:     25844 kB` as bytes (proc_pid_status(5)).
fn status_bytes(status: &str, field: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kilobytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kilobytes as f64 * 1024.0)
}

fn open_files() -> Option<f64> {
    // One of them is the directory itself.
    fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count().saturating_sub(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::encoding::text::encode_registry;

    #[test]
    fn memory_is_told_in_bytes() {
        let status = "Name:\tshunt\nVmSize:\t  281384 kB\nVmRSS:\t   25844 kB\n";
        assert_eq!(status_bytes(status, "VmRSS:"), Some(25844.0 * 1024.0));
        assert_eq!(status_bytes(status, "VmSwap:"), None);
    }

    #[test]
    fn the_usual_names_are_there_with_values_that_can_be() {
        let mut registry = Registry::default();
        register(&mut registry);
        let mut text = String::new();
        encode_registry(&mut text, &registry).unwrap();
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("{name} in {text}")).parse().unwrap()
        };
        assert!(value("process_resident_memory_bytes") <= value("process_virtual_memory_bytes"));
        assert!((3.0..=value("process_max_fds")).contains(&value("process_open_fds")));
        assert!(value("process_start_time_seconds") > 1.7e9);
        assert!(value("process_cpu_seconds_total") > 0.0);
        let build = format!("shunt_build_info{{version=\"0.1.0\",layout=\"{ABI_VERSION}\"}} 1\n");
        assert!(text.contains(&build), "{text}");
    }
}
