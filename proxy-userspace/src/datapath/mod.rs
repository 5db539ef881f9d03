//! The datapath from userspace: programs, maps and links in the kernel, and the one writer of the maps.
//!
//! | module | holds |
//! |---|---|
//! | [`sys`] | system calls that aya does not offer |
//! | [`pins`] | the pin directory: its lock, its names |
//! | [`kfunc`] | marker instructions become calls of kernel functions |
//! | [`object`] | the BPF object as the binary carries it |
//! | [`kernel`] | the BPF object loaded, its maps adopted or made |
//! | [`btf`] | what the kernel's own types say |
//! | [`attach`] | links to control group and devices |
//! | [`device`] | which devices get which programs: a pure decision |
//! | [`network`] | devices and addresses of the node, live |
//! | [`node`] | facts about this node |
//! | [`reserve`] | ports that the kernel shall not give to local sockets |
//! | [`reconcile`] | the only writer: snapshot to plan to tables |
//! | [`backlog`] | operations that were refused, and those behind them |
//! | [`progress`] | what the reconciler tells about its work |
//! | [`restore`] | what the pinned tables say |
//! | [`inspect`] | tables and attachments in words |
//! | [`metrics`] | tables, counters and attachments as metrics |
//! | [`sweep`] | expired flows are removed |
//! | [`fake`] | tables for tests |
//! | [`kept`] | marks of ports that flows keep |
//! | [`maps`] | the tables as the reconciler writes them |
//!
//! No other part of the agent touches a map, a program or a link. Desired state comes in, status goes out.
pub mod attach;
pub mod backlog;
pub mod backoff;
pub mod btf;
pub mod device;
pub mod fake;
pub mod inspect;
pub mod kept;
pub mod kernel;
pub mod kfunc;
pub mod maps;
pub mod metrics;
pub mod network;
pub mod node;
pub mod object;
pub mod pins;
pub mod progress;
pub mod reconcile;
pub mod reserve;
pub mod restore;
pub mod sweep;
pub mod sys;
