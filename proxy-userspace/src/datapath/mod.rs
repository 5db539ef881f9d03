//! The datapath from userspace: programs, maps and links in the kernel, and the one writer of the maps.
//!
//! | module | holds |
//! |---|---|
//! | [`sys`] | system calls that aya does not offer |
//! | [`pins`] | the pin directory: its lock, its names |
//! | [`kfunc`] | marker instructions become calls of kernel functions |
//! | [`kernel`] | the BPF object loaded, its maps adopted or made |
//! | [`btf`] | what the kernel's own types say |
//! | [`attach`] | links to control group and devices |
//! | [`device`] | which devices get which programs: a pure decision |
//! | [`network`] | devices and addresses of the node, live |
//! | [`node`] | facts about this node, reserved source ports |
//! | [`maps`] | the tables as the reconciler writes them |
//!
//! No other part of the agent touches a map, a program or a link. Desired state comes in, status goes out.
pub mod attach;
pub mod btf;
pub mod device;
pub mod kernel;
pub mod kfunc;
pub mod maps;
pub mod network;
pub mod node;
pub mod pins;
pub mod sys;
