//! The control plane of the harness, tested by itself: what Shunt's own suites take for granted about it.
//!
//! ```text
//!  namespace with nothing but lo: etcd, kube-apiserver, kube-controller-manager
//!  kubelets of three nodes (threads of the test); their pods have addresses and no processes
//! ```

mod life;
mod reach;
mod rig;
