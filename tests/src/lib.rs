//! The harness of Shunt's privileged tests: throwaway network namespaces that look like clusters, servers and clients in
//! them, agents on their nodes.
//!
//! | module | holds |
//! |---|---|
//! | [`bed`] | what one test owns: unique names, a directory, a BPF file system |
//! | [`netns`], [`cgroup`], [`process`] | guards that clean up when they are dropped, after a panic too |
//! | [`place`] | where a process runs: a namespace and a control group |
//! | [`topology`] | clusters as CNIs build them |
//! | [`probe`] | servers and load generators, as run by the binary `shunt-probe` |
//! | [`traffic`] | the same from a test's side: start, wait, read statistics |
//! | [`manifests`] | Services, EndpointSlices and Nodes as files |
//! | [`agent`] | the agent under test |
//! | [`browser`] | a real browser that looks at its page |
//! | [`tables`] | what its tables say, as it shows them |
//! | `held` | what it holds in the kernel |
//! | [`control_plane`] | a real Kubernetes control plane, and kubelets that are not real |
//! | [`packet`], [`nat`] | packets from bytes, and what a node must make of them: written apart from the datapath |
//! | [`wait`] | polling for a condition |
//!
//! Functions panic instead of returning errors, so that a failing test shows the line of its call. All traffic stays in
//! namespaces made here; none of them has a route to the host's uplink.

pub mod agent;
pub mod bed;
#[cfg(feature = "datapath")]
pub mod bench;
pub mod browser;
pub mod cgroup;
pub mod control_plane;
#[cfg(feature = "datapath")]
pub mod held;
pub mod manifests;
pub mod nat;
pub mod netns;
pub mod packet;
pub mod place;
pub mod probe;
pub mod process;
pub mod tables;
pub mod topology;
pub mod traffic;
pub mod wait;
