//! The programs of the packet path, run on made packets over the tables that count, and changing none of them.
//!
//! They are loaded once more, with `DRY_RUN` set (see `dry_run` in the eBPF crate): the programs that serve know nothing of
//! it. What one run decided about flows, later runs of the same [`DryRun`] see, so that a packet can be followed through the
//! hooks of several devices, and its answer on the way back.
//!
//! May touch: pinned tables, for reading; a copy of the programs, which it runs in the namespace of the calling thread.

use aya::programs::{ProgramError, SchedClassifier, Xdp};
use aya::{TestRun, TestRunOptions, TestRunResult};
use proxy_common::abi::flow::{FlowKey, FlowValue};
use proxy_common::verdict::DropReason;

use super::inspect;
use super::kernel::{self, MapFds};
use super::maps::{self, Table};
use super::object::OBJECT;
use super::pins::Pins;

/// Why a dry run failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The programs cannot be loaded over the tables that are there.
    #[error(transparent)]
    Load(#[from] kernel::Error),
    /// A table cannot be read.
    #[error(transparent)]
    Maps(#[from] maps::Error),
    /// The kernel does not run a program.
    #[error("cannot run the program {name} on a made packet")]
    Run {
        /// Its name.
        name: &'static str,
        /// The kernel's answer.
        #[source]
        source: Box<ProgramError>,
    },
    /// The program answered what none of ours answers.
    #[error("the program {name} answered {answer}")]
    Answer {
        /// Its name.
        name: &'static str,
        /// What it returned.
        answer: u32,
    },
}

/// A program that packets meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// XDP of an uplink.
    Uplink,
    /// The way in.
    Ingress,
    /// The way in by a port of a bridge.
    IngressPort,
    /// The way out.
    Egress,
}

impl Hook {
    /// Its program's name in the object.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Uplink => "uplink",
            Self::Ingress => "ingress",
            Self::IngressPort => "ingress_port",
            Self::Egress => "egress",
        }
    }
}

/// What a program does with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on, as this frame.
    Next(Vec<u8>),
    /// It is dropped.
    Dropped(Option<DropReason>),
    /// This frame is sent back instead.
    Answered(Option<DropReason>, Vec<u8>),
}

/// The programs of a dry run, and what they have decided so far.
pub struct DryRun {
    loaded: kernel::DryRun,
}

/// Room for what comes out: no program makes a packet longer than an answer.
const ROOM: usize = 4096;

impl DryRun {
    /// Loads the programs of `hooks`.
    pub fn load(pins: &Pins, hooks: &[Hook]) -> Result<Self, Error> {
        let names: Vec<_> = hooks.iter().map(|hook| hook.program()).collect();
        Ok(Self { loaded: kernel::load_dry_run(OBJECT, pins, &names)? })
    }

    /// The tables that count, and the dry run's own.
    pub fn maps(&self) -> &MapFds {
        &self.loaded.maps
    }

    /// Runs a program on an Ethernet frame that is on the device with this index of the calling thread's namespace.
    pub fn run(&self, hook: Hook, ifindex: u32, frame: &[u8]) -> Result<Outcome, Error> {
        let before = inspect::read_drops(self.maps())?;
        let name = hook.program();
        let missing = || kernel::Error::Missing { kind: "program", name: name.to_owned() };
        let refused = |source| Error::Run { name, source: Box::new(source) };
        let program = self.loaded.ebpf.program(name).ok_or_else(missing)?;
        let mut out = vec![0; frame.len() + ROOM];
        let answer = if hook == Hook::Uplink {
            let program: &Xdp = program.try_into().map_err(refused)?;
            run(program, frame, &xdp_context(ifindex, frame.len()), &mut out)
        } else {
            let program: &SchedClassifier = program.try_into().map_err(refused)?;
            run(program, frame, &skb_context(ifindex), &mut out)
        };
        let answer = answer.map_err(refused)?;
        let after = inspect::read_drops(self.maps())?;
        let reason = DropReason::ALL.into_iter().find(|&reason| after[reason as usize] != before[reason as usize]);
        // TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT (uapi/linux/pkt_cls.h); XDP_DROP, XDP_PASS, XDP_TX (uapi/linux/bpf.h).
        match (hook, answer) {
            (Hook::Uplink, 2) | (Hook::Ingress | Hook::IngressPort | Hook::Egress, u32::MAX) => Ok(Outcome::Next(out)),
            (Hook::Uplink, 1) | (Hook::Ingress | Hook::IngressPort | Hook::Egress, 2) => Ok(Outcome::Dropped(reason)),
            (Hook::Uplink, 3) | (Hook::Ingress | Hook::IngressPort | Hook::Egress, 7) => {
                Ok(Outcome::Answered(reason, out))
            }
            (_, answer) => Err(Error::Answer { name, answer }),
        }
    }

    /// A flow entry as the programs would see it now: what they decided in this dry run, else what there is.
    pub fn flow(&self, key: &FlowKey) -> Result<Option<FlowValue>, Error> {
        for (own, real) in [("dry_flows", "flows"), ("dry_flows_pending", "flows_pending")] {
            let found = match self.flow_in(own, key)? {
                Some(value) if value.has(FlowValue::GONE) => None,
                Some(value) => Some(value),
                None => self.flow_in(real, key)?,
            };
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// True if a flow entry is there outside of the dry run.
    pub fn has_flow(&self, key: &FlowKey) -> Result<bool, Error> {
        Ok(self.flow_in("flows", key)?.is_some() || self.flow_in("flows_pending", key)?.is_some())
    }

    fn flow_in(&self, table: &'static str, key: &FlowKey) -> Result<Option<FlowValue>, Error> {
        Ok(Table::<FlowKey, FlowValue>::open(self.maps(), table).map_err(maps::Error::from)?.get(key)?)
    }
}

fn run<P>(program: &P, frame: &[u8], context: &[u8], out: &mut Vec<u8>) -> Result<u32, ProgramError>
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let options = TestRunOptions {
        data_in: Some(frame),
        data_out: Some(&mut out[..]),
        ctx_in: Some(context),
        ..TestRunOptions::default()
    };
    let result = program.test_run(options)?;
    let length = result.data_size_out as usize;
    let answer = result.return_value;
    out.truncate(length);
    Ok(answer)
}

/// `struct __sk_buff` (uapi/linux/bpf.h) of a packet on a device.
fn skb_context(ifindex: u32) -> [u8; 192] {
    const IFINDEX: usize = 40;
    let mut bytes = [0; 192];
    bytes[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
    bytes
}

/// `struct xdp_md` (uapi/linux/bpf.h) of a frame of `length` bytes in the first receive queue of a device.
fn xdp_context(ifindex: u32, length: usize) -> [u8; 24] {
    let (data_end, rx_queue) = (length as u32, 0);
    let words = [0, data_end, 0, ifindex, rx_queue, 0];
    std::array::from_fn(|at| words[at / 4].to_ne_bytes()[at % 4])
}
