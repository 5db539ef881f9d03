//! The datapath from userspace: programs, maps and links in the kernel, and the one writer of the maps.
//!
//! | module | holds |
//! |---|---|
//! | [`sys`] | system calls that aya does not offer |
//! | [`pins`] | the pin directory: its lock, its names |
//! | [`kfunc`] | marker instructions become calls of kernel functions |
//! | [`object`] | the BPF object as the binary carries it |
//! | [`kernel`] | the BPF object loaded, its maps adopted or made |
//! | [`layout`] | which tables of another layout are shared, copied, made: a pure decision |
//! | [`handover`] | from one layout to another under traffic |
//! | [`carry`] | what is copied between layouts, and what becomes of what changes meanwhile |
//! | [`convert`] | records of older versions |
//! | [`btf`] | what the kernel's own types say |
//! | [`guard`] | pins that somebody else removes are made again |
//! | [`attach`] | programs on control group and devices |
//! | [`clsact`], [`filter`] | programs on devices of kernels without links to them |
//! | [`gate`] | what keeps packets whole while a device goes from one means to the other |
//! | [`device`] | which devices get which programs: a pure decision |
//! | [`network`] | devices and addresses of the node, live |
//! | [`other_proxies`] | traces of other service proxies |
//! | [`node`] | facts about this node |
//! | [`conntrack`] | limits and timeouts of the kernel's connection tracking, where they are asked for |
//! | [`reserve`] | ports that the kernel shall not give to local sockets |
//! | [`reconcile`] | the only writer: snapshot to plan to tables |
//! | [`audit`] | what somebody else changes in the tables is found and written again |
//! | [`backlog`] | operations that were refused, and those behind them |
//! | [`progress`] | what the reconciler tells about its work |
//! | [`restore`] | what the pinned tables say |
//! | [`lookup`] | `proxy-common`'s look-ups over the pinned tables |
//! | [`dry_run`] | the packet programs run on made packets, changing nothing |
//! | [`route`] | where the kernel would send a packet |
//! | [`monitor`] | what the programs tell while somebody watches |
//! | [`survey`] | what a person who looks for a fault wants to see |
//! | [`inspect`] | tables and attachments in words |
//! | [`overlap`], [`listener`] | NodePorts that something else on this node has too |
//! | [`fullness`] | tables that are nearly full |
//! | [`metrics`] | tables, counters and attachments as metrics |
//! | [`sweep`] | expired flows are removed |
//! | [`stale`] | connections are ended whose endpoint is gone |
//! | [`sock_diag`], [`namespaces`] | sockets by what the hooks keep with them, and where to look for them |
//! | [`socket_owner`] | the same of sockets that the kernel does not list it of |
//! | [`netlink`] | messages as bytes |
//! | [`predecessor`], [`netfilter`] | what a kube-proxy that is replaced has open goes on without it |
//! | [`withdraw`] | frontends go, flows stay: before a successor takes over |
//! | [`fake`] | tables for tests |
//! | [`kept`] | marks of ports that flows keep |
//! | [`maps`] | the tables as the reconciler writes them |
//!
//! No other part of the agent touches a map, a program or a link. Desired state comes in, status goes out.
//!
//! Kernels before 6.6 have no links to devices. There, or if `--attach clsact` says so, programs run in filters of the devices'
//! clsact qdiscs: the same programs, at the same places, taken over by the next agent and replaced in one step likewise. What
//! is different: anybody can remove a filter by accident, a filter of somebody else may decide about a packet before ours sees
//! it, and only who is in the device's namespace can remove ours. Where *tcx* is written, clsact is meant too.
//!
//! XDP comes before the tcx programs of an uplink, and never instead of them: what it passes, and every device without it, is
//! served by tcx alone. It is off unless asked for. Attaching it makes many drivers reset their queues, and switches off LRO
//! and hardware GRO, which a node with mostly bulk traffic would miss; and no measurement on hardware says yet what it gains.
//! `auto` takes hardware only, `native` also a veth or tap that carries the node's main address; neither falls back to the
//! kernel's generic mode, in which segmented senders crawl. On a veth, resets are left to tcx (see `uplink` in the eBPF
//! crate), and partial checksums are the user's affair.
pub mod attach;
pub mod audit;
pub mod backlog;
pub mod backoff;
pub mod btf;
pub mod carry;
pub mod clsact;
pub mod conntrack;
pub mod convert;
pub mod device;
pub mod dry_run;
pub mod fake;
pub mod filter;
pub mod fullness;
pub mod gate;
pub mod guard;
pub mod handover;
pub mod inspect;
pub mod kept;
pub mod kernel;
pub mod kfunc;
pub mod layout;
pub mod listener;
pub mod lookup;
pub mod maps;
pub mod metrics;
pub mod monitor;
pub mod namespaces;
pub mod netfilter;
pub mod netlink;
pub mod network;
pub mod node;
pub mod object;
pub mod other_proxies;
pub mod overlap;
pub mod pins;
pub mod predecessor;
pub mod progress;
pub mod reconcile;
pub mod reserve;
pub mod restore;
pub mod route;
pub mod sock_diag;
pub mod socket_owner;
pub mod stale;
pub mod survey;
pub mod sweep;
pub mod sys;
pub mod withdraw;
