//! What the kernel can do, tried or read from its own types; versions are told, never compared.
//!
//! May touch: /sys/kernel/btf, /proc/sys/net/core, the list of programs, for reading.

use std::io;

use aya_obj::generated::bpf_attach_type::BPF_TCX_INGRESS;

use super::super::btf::{self, Answers};
use super::super::kfunc::KFUNCS;
use super::super::sys::{self, HookTarget};
use super::{Seen, Unseen, read};

/// The kernel, as far as the programs use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// As uname(1) tells it.
    pub release: String,
    /// Programs can be attached to devices by links.
    pub has_tcx: Seen<bool>,
    /// The look-up of a route tells the source address too (`BPF_FIB_LOOKUP_SRC`); nothing if the kernel has no BTF.
    pub has_source_lookup: Option<bool>,
    /// Functions that the programs call and the kernel lacks.
    pub missing_functions: Vec<&'static str>,
    /// net.core.bpf_jit_enable, where this network namespace shows it.
    pub jit: Option<u32>,
}

impl Kernel {
    /// Tries everything.
    pub fn probe() -> Seen<Self> {
        let names = KFUNCS.map(|kfunc| kfunc.name);
        let answers = Answers::of_kernel(&names, &[]).map_err(|error| Unseen::because(&error))?;
        let source = btf::Answers::kernel_names("BPF_FIB_LOOKUP_SRC").map_err(|error| Unseen::because(&error))?;
        Ok(Self {
            release: read("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            has_tcx: has_tcx(),
            has_source_lookup: source,
            missing_functions: names.into_iter().filter(|name| answers.function(name).is_none()).collect(),
            jit: read("/proc/sys/net/core/bpf_jit_enable").and_then(|text| text.trim().parse().ok()),
        })
    }
}

/// A kernel that does not know the hook refuses to list its programs, on whatever device.
fn has_tcx() -> Seen<bool> {
    const LOOPBACK: u32 = 1;
    match sys::attached_programs(HookTarget::Device(LOOPBACK), BPF_TCX_INGRESS) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(false),
        Err(error) => Err(Unseen(format!("the kernel cannot be asked for the programs of a device: {error}"))),
    }
}
