//! The agent on a real control plane: what users declare in the Kubernetes API is what clients meet.
//!
//! ```text
//!  net: etcd, kube-apiserver, kube-controller-manager at 192.0.2.1 ──┬── client
//!                                                                    ├── node-1: agent, pods of the kubelet, client pods
//!                                                                    └── node-2: agent, pods of the kubelet, client pods
//! ```
//! The agents have the kubeconfig of `system:kube-proxy`, whose role the server itself makes, and nothing else. Pods are
//! namespaces with servers; the kubelet of the harness starts, probes and ends them.

mod events;
mod follow;
mod handover;
mod outage;
mod rig;
mod update;
