//! cgroup programs on socket calls: connect, sendmsg, recvmsg and getpeername, for both families.
//!
//! A socket is sent to a backend when it dials a frontend; what the application dialled is kept in the socket's own
//! storage and shown to it again. An answer of 1 lets the call go on; 0 makes it fail with the error set before.

use crate::counter;
use crate::events;
use crate::maps;
use crate::tables::{Env, now};
use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_addr};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval, bpf_sk_storage_delete, bpf_sk_storage_get,
};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use proxy_common::abi::event::EventKind;
use proxy_common::abi::socket::SocketEntry;
use proxy_common::addr::{Addr, Be16, Proto};
use proxy_common::lb::socket::{self, Dial, Unserved, Verdict};
use proxy_common::verdict::DropReason;

const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
const SOCK_STREAM: u32 = 1;
const SOCK_DGRAM: u32 = 2;
const IPPROTO_TCP: u32 = Proto::TCP.0 as u32;
const IPPROTO_UDP: u32 = Proto::UDP.0 as u32;
/// Multipath TCP (linux/in.h): its packets are of TCP. Where the kernel asks for the connection; Linux 6.18 asks for its first
/// path, a TCP socket, whose storage `getpeername` on the connection does not find: that shows the backend.
const IPPROTO_MPTCP: u32 = 262;
/// State of a connected socket, UDP included (include/net/tcp_states.h).
const TCP_ESTABLISHED: u32 = 1;
/// errno.h; the only error that applications ever get from here.
const ECONNREFUSED: i32 = 111;

/// One call on a socket.
struct Call {
    ctx: *mut bpf_sock_addr,
    v6: bool,
}

impl Call {
    #[inline(always)]
    fn new(ctx: &SockAddrContext, v6: bool) -> Self {
        Self { ctx: ctx.sock_addr, v6 }
    }

    /// TCP, UDP, or nothing that concerns us.
    #[inline(always)]
    fn proto(&self) -> Option<Proto> {
        // SAFETY: the context of the running program.
        let (kind, protocol) = unsafe { ((*self.ctx).type_, (*self.ctx).protocol) };
        match (kind, protocol) {
            // Further paths of one connection go where the first went: to the backend itself.
            (SOCK_STREAM, IPPROTO_TCP | IPPROTO_MPTCP) => Some(Proto::TCP),
            (SOCK_DGRAM, IPPROTO_UDP) => Some(Proto::UDP),
            _ => None,
        }
    }

    /// The address in the call, or `None` if it is one that v6 sockets handle elsewhere.
    #[inline(always)]
    fn addr(&self) -> Addr {
        // SAFETY: the context of the running program; words are read one by one, as the verifier wants.
        unsafe {
            if self.v6 {
                let words = (&raw const (*self.ctx).user_ip6).cast::<u32>();
                Addr([
                    words.read_volatile(),
                    words.add(1).read_volatile(),
                    words.add(2).read_volatile(),
                    words.add(3).read_volatile(),
                ])
            } else {
                Addr::from_v4_word((&raw const (*self.ctx).user_ip4).read_volatile())
            }
        }
    }

    #[inline(always)]
    fn port(&self) -> Be16 {
        // SAFETY: the context of the running program; the port lies in the lower half in wire order.
        Be16(unsafe { (&raw const (*self.ctx).user_port).read_volatile() } as u16)
    }

    /// Replaces the address in the call. A v6 socket takes an IPv4 backend in its mapped form.
    #[inline(always)]
    fn set(&self, addr: &Addr, port: Be16) {
        // SAFETY: the context of the running program; these fields may be written, word by word.
        unsafe {
            if self.v6 {
                let words = (&raw mut (*self.ctx).user_ip6).cast::<u32>();
                words.write_volatile(addr.0[0]);
                words.add(1).write_volatile(addr.0[1]);
                words.add(2).write_volatile(addr.0[2]);
                words.add(3).write_volatile(addr.0[3]);
            } else {
                (&raw mut (*self.ctx).user_ip4).write_volatile(addr.v4_word());
            }
            (&raw mut (*self.ctx).user_port).write_volatile(port.0 as u32);
        }
    }

    #[inline(always)]
    fn socket(&self) -> *mut bpf_sock {
        // SAFETY: the context of the running program.
        unsafe { (*self.ctx).__bindgen_anon_1.sk }
    }

    #[inline(always)]
    fn is_bound(&self) -> bool {
        let socket = self.socket();
        // SAFETY: not null; a socket of the kernel, its port in host order.
        !socket.is_null() && unsafe { (*socket).src_port } != 0
    }

    #[inline(always)]
    fn is_connected(&self) -> bool {
        let socket = self.socket();
        // SAFETY: not null; a socket of the kernel.
        !socket.is_null() && unsafe { (*socket).state } == TCP_ESTABLISHED
    }

    /// The address in the call is the one that the socket is connected to.
    #[inline(always)]
    fn names_peer(&self) -> bool {
        if !self.is_connected() {
            return false;
        }
        let socket = self.socket();
        // SAFETY: not null, as `is_connected` saw; words are read one by one, as the verifier wants.
        let (addr, port) = unsafe {
            let addr = if self.v6 {
                let words = (&raw const (*socket).dst_ip6).cast::<u32>();
                Addr([
                    words.read_volatile(),
                    words.add(1).read_volatile(),
                    words.add(2).read_volatile(),
                    words.add(3).read_volatile(),
                ])
            } else {
                Addr::from_v4_word((&raw const (*socket).dst_ip4).read_volatile())
            };
            (addr, Be16((&raw const (*socket).dst_port).read_volatile()))
        };
        port == self.port() && addr == self.addr()
    }

    #[inline(always)]
    fn dial(&self, proto: Proto) -> Dial {
        // SAFETY: the context of the running program.
        let (socket, netns) =
            unsafe { (bpf_get_socket_cookie(self.ctx.cast()), bpf_get_netns_cookie(self.ctx.cast())) };
        Dial { addr: self.addr(), port: self.port(), proto, socket, netns, bound: self.is_bound(), now: now() }
    }

    #[inline(always)]
    fn refuse(&self) -> i32 {
        // SAFETY: no pointers.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
        REFUSE
    }
}

#[inline(always)]
fn storage<T>(map: &SkStorage<T>, call: &Call, create: bool) -> Option<&'static mut T> {
    let flags = if create { BPF_SK_STORAGE_GET_F_CREATE as u64 } else { 0 };
    // SAFETY: the call's socket; the element belongs to it, and only calls on it, which the kernel puts in order or which
    // tolerate each other's words, write it.
    unsafe {
        bpf_sk_storage_get(
            core::ptr::from_ref(map).cast_mut().cast(),
            call.socket().cast(),
            core::ptr::null_mut(),
            flags,
        )
        .cast::<T>()
        .as_mut()
    }
}

#[inline(always)]
fn forget<T>(map: &SkStorage<T>, call: &Call) {
    // SAFETY: the call's socket.
    unsafe { bpf_sk_storage_delete(core::ptr::from_ref(map).cast_mut().cast(), call.socket().cast()) };
}

/// A process was sent to a backend.
#[inline(always)]
fn tell(kind: EventKind, dial: &Dial, entry: &SocketEntry) {
    let to = events::Backend { addr: entry.backend, port: entry.backend_port };
    events::socket(kind, dial, Some(&to), 0);
}

/// A process is refused.
#[inline(always)]
fn refuse(call: &Call, dial: &Dial, reason: DropReason) -> i32 {
    counter::drop(reason);
    events::socket(EventKind::SocketRefused, dial, None, reason as u32);
    call.refuse()
}

/// What the socket sent before it is connected has no answers any more: the kernel takes none but the peer's.
#[inline(always)]
fn forget_datagrams(call: &Call, proto: Proto) {
    if proto == Proto::UDP {
        forget(&maps::sockets_udp, call);
    }
}

#[inline(always)]
fn connect(call: &Call) -> i32 {
    let Some(proto) = call.proto() else { return ALLOW };
    let env = Env { ctx: () };
    let dial = call.dial(proto);
    match socket::dial(&env, &dial) {
        Verdict::Leave => {
            // The socket may have dialled a frontend before: a UDP socket is connected anew, a TCP connect failed.
            forget(&maps::sockets, call);
            forget_datagrams(call, proto);
            ALLOW
        }
        Verdict::Translate(entry) => {
            // Without a memory the application would see another peer than it dialled: leave it to the packet path.
            let Some(stored) = storage(&maps::sockets, call, true) else { return ALLOW };
            *stored = entry;
            forget_datagrams(call, proto);
            call.set(&entry.backend, entry.backend_port);
            tell(EventKind::Socket, &dial, &entry);
            ALLOW
        }
        Verdict::Reject(reason) => refuse(call, &dial, reason),
    }
}

#[inline(always)]
fn sendmsg(call: &Call) -> i32 {
    if call.proto() != Some(Proto::UDP) {
        return ALLOW;
    }
    // The kernel asks here for connected sockets too if they are of IPv6 with an IPv4-mapped peer (udpv6_sendmsg); what
    // becomes of those was decided when they were connected.
    if call.names_peer() {
        return ALLOW;
    }
    let env = Env { ctx: () };
    let dial = call.dial(Proto::UDP);
    let table = storage(&maps::sockets_udp, call, false);
    let frontend = match socket::find(&env, &dial, false) {
        Ok(frontend) => frontend,
        Err(Unserved::Leave) => {
            if let Some(table) = table {
                socket::disown(table, &dial.addr, dial.port);
            }
            return ALLOW;
        }
        Err(Unserved::Reject(reason)) => return refuse(call, &dial, reason),
    };
    if let Some(table) = table
        && let Some((backend, port)) = socket::recall(&env, table, &dial, frontend)
    {
        call.set(&backend, port);
        return ALLOW;
    }
    match socket::choose(&env, &dial, frontend) {
        Verdict::Leave => ALLOW,
        Verdict::Translate(entry) => {
            let Some(table) = storage(&maps::sockets_udp, call, true) else { return ALLOW };
            let kind =
                if socket::is_known(table, &dial.addr, dial.port) { EventKind::SocketMoved } else { EventKind::Socket };
            socket::store(table, &entry);
            call.set(&entry.backend, entry.backend_port);
            tell(kind, &dial, &entry);
            ALLOW
        }
        Verdict::Reject(reason) => refuse(call, &dial, reason),
    }
}

/// Shows the frontend as sender of a datagram. Called for connected sockets too.
#[inline(always)]
fn recvmsg(call: &Call) -> i32 {
    let (addr, port) = (call.addr(), call.port());
    if let Some(table) = storage(&maps::sockets_udp, call, false)
        && let Some(entry) = socket::entry_from(table, &addr, port)
    {
        call.set(&entry.frontend, entry.frontend_port);
        return ALLOW;
    }
    // What an unconnected socket once was connected to tells nothing.
    if call.is_connected() { getpeername(call) } else { ALLOW }
}

/// Shows the frontend as peer of a connected socket.
#[inline(always)]
fn getpeername(call: &Call) -> i32 {
    if let Some(entry) = storage(&maps::sockets, call, false)
        && entry.backend_port == call.port()
        && entry.backend == call.addr()
    {
        call.set(&entry.frontend, entry.frontend_port);
    }
    ALLOW
}

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect(&Call::new(&ctx, false))
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect(&Call::new(&ctx, true))
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    sendmsg(&Call::new(&ctx, false))
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    sendmsg(&Call::new(&ctx, true))
}

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    recvmsg(&Call::new(&ctx, false))
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    recvmsg(&Call::new(&ctx, true))
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    getpeername(&Call::new(&ctx, false))
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    getpeername(&Call::new(&ctx, true))
}
