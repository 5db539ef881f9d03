//! The programs in the kernel, and one packet through one of them.

use std::os::fd::AsFd as _;
use std::sync::Arc;

use aya::programs::{SchedClassifier, Xdp};
use aya::{TestRun as _, TestRunOptions};
use aya_obj::programs::XdpAttachType;
use proxy_common::verdict::DropReason;
use proxy_userspace::datapath::kernel::{self, Continuations, MapFds, Sizes};
use proxy_userspace::datapath::object::OBJECT;
use proxy_userspace::datapath::pins::Pins;
use proxy_userspace::datapath::sys;
use shunt_tests::bed::Bed;
use shunt_tests::nat::Hook;
use shunt_tests::netns::Netns;

/// `struct __sk_buff` (uapi/linux/bpf.h), as far as a test run takes it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Context([u8; 192]);

impl Context {
    const IFINDEX: usize = 40;

    fn on_device(ifindex: u32) -> Self {
        let mut bytes = [0; 192];
        bytes[Self::IFINDEX..Self::IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
        Self(bytes)
    }
}

/// `struct xdp_md` (uapi/linux/bpf.h): a frame of `length` bytes in the first receive queue of a device.
fn xdp_context(ifindex: u32, length: usize) -> [u8; 24] {
    let (data_end, rx_queue) = (length as u32, 0);
    let words = [0, data_end, 0, ifindex, rx_queue, 0];
    std::array::from_fn(|at| words[at / 4].to_ne_bytes()[at % 4])
}

/// What a program did with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on, as these bytes.
    Next(Vec<u8>),
    /// It is dropped.
    Dropped,
    /// These bytes are sent instead.
    Answered(Vec<u8>),
}

/// The loaded programs and their maps.
pub struct Datapath {
    ingress: SchedClassifier,
    ingress_port: SchedClassifier,
    egress: SchedClassifier,
    uplink: Xdp,
    /// The maps, by name.
    pub maps: MapFds,
    ns: Arc<Netns>,
    /// The kernel empties it when it is let go of.
    _continuations: Continuations,
}

/// Room for what comes out: no program makes a packet longer than an answer.
const ROOM: usize = 16384;

impl Datapath {
    /// Fresh maps, and programs that will run in `ns`.
    pub fn load(bed: &Bed, ns: &Arc<Netns>) -> Self {
        let pins = Pins::new(bed.bpffs("bpf").join("shunt"));
        pins.prepare().expect("the test's BPF file system takes pins");
        let sizes = Sizes { services: 1024, backends: 1024, flows: 65536 };
        let loaded = kernel::load(OBJECT, &pins, &sizes).unwrap_or_else(|error| panic!("{error:#}: {error:?}"));
        let pin = |name: &str| {
            let path = pins.base().join(name);
            let fd = loaded.programs.get(name).expect("the object has it");
            sys::pin(fd.as_fd(), &path).expect("programs can be pinned");
            path
        };
        let program = |name: &str| SchedClassifier::from_pin(pin(name)).expect("it was pinned just now");
        Self {
            ingress: program("ingress"),
            ingress_port: program("ingress_port"),
            egress: program("egress"),
            uplink: Xdp::from_pin(pin("uplink"), XdpAttachType::Interface).expect("it was pinned just now"),
            maps: loaded.maps,
            ns: ns.clone(),
            _continuations: loaded.continuations,
        }
    }

    /// What the program of `hook` does with `frame` on the device.
    pub fn run(&self, hook: Hook, ifindex: u32, frame: &[u8]) -> Outcome {
        // The programs ask for routes and sockets of the namespace that runs them.
        self.ns.run(|| self.run_here(hook, ifindex, frame))
    }

    /// What the XDP program does with `frame` on the device.
    pub fn run_uplink(&self, ifindex: u32, frame: &[u8]) -> Outcome {
        let mut out = vec![0; ROOM];
        let context = xdp_context(ifindex, frame.len());
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        let result = self.ns.run(|| self.uplink.test_run(options));
        let result = result.unwrap_or_else(|error| panic!("cannot run XDP on {} bytes: {error:?}", frame.len()));
        out.truncate(result.data_size_out as usize);
        // XDP_DROP, XDP_PASS, XDP_TX (uapi/linux/bpf.h).
        match result.return_value {
            1 => Outcome::Dropped,
            2 => Outcome::Next(out),
            3 => Outcome::Answered(out),
            other => panic!("XDP returned {other}"),
        }
    }

    /// How many of the frames `is_counted` says yes to, each run through the program of `hook`.
    pub fn run_all(
        &self,
        hook: Hook,
        ifindex: u32,
        frames: impl Iterator<Item = Vec<u8>> + Send,
        is_counted: impl Fn(&Outcome) -> bool + Sync,
    ) -> usize {
        self.ns.run(|| frames.filter(|frame| is_counted(&self.run_here(hook, ifindex, frame))).count())
    }

    fn run_here(&self, hook: Hook, ifindex: u32, frame: &[u8]) -> Outcome {
        let mut out = vec![0; ROOM];
        let context = Context::on_device(ifindex);
        let program = match hook {
            Hook::Ingress => &self.ingress,
            Hook::IngressPort => &self.ingress_port,
            Hook::Egress => &self.egress,
        };
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context.0),
            ..TestRunOptions::default()
        };
        let result = program
            .test_run(options)
            .unwrap_or_else(|error| panic!("cannot run {hook:?} on {} bytes: {error:?}", frame.len()));
        out.truncate(result.data_size_out as usize);
        // TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT (uapi/linux/pkt_cls.h).
        match result.return_value as i32 {
            -1 => Outcome::Next(out),
            2 => Outcome::Dropped,
            7 => Outcome::Answered(out),
            other => panic!("{hook:?} returned {other}"),
        }
    }

    /// Drops so far, by reason.
    pub fn drops(&self) -> Vec<(DropReason, u64)> {
        let cpus = aya::util::nr_cpus().expect("the number of CPUs is known");
        let map = self.maps.get("drop_counters").expect("the object has it");
        let count = |reason: DropReason| {
            let mut copies = vec![0_u64; cpus];
            sys::map_lookup(map, &(reason as u32), &mut copies).expect("every reason has its counter");
            (reason, copies.iter().sum())
        };
        DropReason::ALL.map(count).to_vec()
    }
}
