//! What `deploy/` says to a cluster: taken by the real API server, and run as it stands.
//!
//! ```text
//!  net: etcd, kube-apiserver, kube-controller-manager at 192.0.2.1 ──┬── client
//!                                                                    └── node-1: a mount namespace of its own without a BPF file
//!                                                                        system; the containers of the manifest by runc; pods
//! ```
//! kubectl and Helm are the real ones too. Of a kubelet there is what it makes of the pod template (`pod`). The image is that of
//! `cargo xtask image`; its layout is named by `SHUNT_IMAGE`.

mod container;
mod image;
mod manifests;
mod pod;
mod rig;
mod run;
