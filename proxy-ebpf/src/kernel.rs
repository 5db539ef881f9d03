//! What only the kernel can tell a TC program: routes, neighbours, sockets, connection tracking.

use crate::maps;
use crate::packet::SkBuff;
use crate::tables::{self, Env};
use aya_ebpf::bindings::{
    __sk_buff, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS,
    BPF_FIB_LOOKUP_SKIP_NEIGH, BPF_FIB_LOOKUP_SRC, bpf_fib_lookup as FibLookup, bpf_sock, bpf_sock_tuple,
};
use aya_ebpf::helpers::generated::{bpf_fib_lookup, bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release};
use proxy_common::abi::flow::{FlowKey, FlowRef, FlowValue};
use proxy_common::abi::fragment::{FragmentKey, FragmentValue};
use proxy_common::addr::{Addr, Proto};
use proxy_common::lb::flow::{Nanos, Seconds};
use proxy_common::lb::tuple::Tuple;
use proxy_common::tables::{Flows, Lookups, Neighbour, Tracked};

/// The context of a TC program.
#[derive(Clone, Copy)]
pub struct Device {
    /// The packet.
    pub skb: SkBuff,
    /// The device is a port of a bridge.
    pub is_port: bool,
}

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// The namespace of the device.
const BPF_F_CURRENT_NETNS: u64 = u64::MAX;

/// Offset of `status` in `struct nf_conn`, from the kernel's BTF; set at load. 0: not known.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".rodata.cfg")]
static NF_CONN_STATUS: aya_ebpf::Global<u32> = aya_ebpf::Global::new(0);

/// `IPS_DST_NAT` of `enum ip_conntrack_status` (uapi/linux/netfilter/nf_conntrack_common.h).
const IPS_DST_NAT: u32 = 1 << 5;

#[inline(always)]
fn fib_params(src: &Addr, dst: &Addr, ifindex: u32) -> FibLookup {
    // SAFETY: integers only, for which zero is a value.
    let mut params: FibLookup = unsafe { core::mem::zeroed() };
    params.ifindex = ifindex;
    if dst.is_v4() {
        params.family = AF_INET;
        params.__bindgen_anon_3.ipv4_src = src.v4_word();
        params.__bindgen_anon_4.ipv4_dst = dst.v4_word();
    } else {
        params.family = AF_INET6;
        params.__bindgen_anon_3.ipv6_src = src.0;
        params.__bindgen_anon_4.ipv6_dst = dst.0;
    }
    params
}

#[inline(always)]
fn look_up_route(skb: SkBuff, params: &mut FibLookup, flags: u32) -> u32 {
    // SAFETY: the context of the running program, and parameters of the given size.
    unsafe { bpf_fib_lookup(skb.0.cast(), core::ptr::from_mut(params), size_of::<FibLookup>() as i32, flags) as u32 }
}

/// The kernel's tuple for socket look-ups, and its size.
#[inline(always)]
fn socket_tuple(tuple: &Tuple) -> (bpf_sock_tuple, u32) {
    // SAFETY: integers only, for which zero is a value.
    let mut out: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    if tuple.dst.is_v4() {
        out.__bindgen_anon_1.ipv4.saddr = tuple.src.v4_word();
        out.__bindgen_anon_1.ipv4.daddr = tuple.dst.v4_word();
        out.__bindgen_anon_1.ipv4.sport = tuple.sport.0;
        out.__bindgen_anon_1.ipv4.dport = tuple.dport.0;
        (out, 12)
    } else {
        out.__bindgen_anon_1.ipv6.saddr = tuple.src.0;
        out.__bindgen_anon_1.ipv6.daddr = tuple.dst.0;
        out.__bindgen_anon_1.ipv6.sport = tuple.sport.0;
        out.__bindgen_anon_1.ipv6.dport = tuple.dport.0;
        (out, 36)
    }
}

/// True if the looked-up socket is connected; releases it.
#[inline(always)]
fn is_connected(socket: *mut bpf_sock) -> bool {
    if socket.is_null() {
        return false;
    }
    // SAFETY: not null, held until the release below.
    unsafe {
        let connected = (*socket).dst_port != 0;
        bpf_sk_release(socket.cast());
        connected
    }
}

/// Options of the connection-tracking functions (`struct bpf_ct_opts`, its first twelve bytes, which all kernels take).
#[repr(C)]
struct TrackOptions {
    netns: i32,
    error: i32,
    l4proto: u8,
    dir: u8,
    reserved: [u8; 2],
}

/// `bpf_skb_ct_lookup`: a marker that the loader turns into the call (see the agent's `datapath/kfunc.rs`), or into
/// "nothing known" on kernels without it.
#[inline(always)]
fn track_lookup(skb: SkBuff, tuple: &bpf_sock_tuple, size: u32, options: &mut TrackOptions) -> u64 {
    let found: u64;
    // SAFETY: a call with the registers of the BPF calling convention; all pointers are valid for the given sizes.
    unsafe {
        core::arch::asm!(
            ".byte 0x85, 0x20, 0, 0, 1, 0x4b, 0xfc, 0x7a",
            inlateout("r1") skb.0 => _,
            inlateout("r2") core::ptr::from_ref(tuple) => _,
            inlateout("r3") size as u64 => _,
            inlateout("r4") core::ptr::from_mut(options) => _,
            inlateout("r5") size_of::<TrackOptions>() as u64 => _,
            lateout("r0") found,
        );
    }
    found
}

/// `bpf_ct_release`, likewise.
#[inline(always)]
fn track_release(connection: u64) {
    // SAFETY: as above; `connection` is a reference that `track_lookup` returned.
    unsafe {
        core::arch::asm!(
            ".byte 0x85, 0x20, 0, 0, 2, 0x4b, 0xfc, 0x7a",
            inlateout("r1") connection => _,
            lateout("r2") _, lateout("r3") _, lateout("r4") _, lateout("r5") _, lateout("r0") _,
        );
    }
}

impl Lookups for Env<Device> {
    #[inline(always)]
    fn established(&self, key: &FlowKey) -> Option<FlowRef<'_>> {
        tables::established(key)
    }

    #[inline(always)]
    fn pending(&self, key: &FlowKey) -> Option<FlowRef<'_>> {
        tables::pending(key)
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.ctx.skb.ifindex()
    }

    #[inline(always)]
    fn now(&self) -> Seconds {
        tables::now()
    }
}

impl Flows for Env<Device> {
    #[inline(always)]
    fn draft(&self) -> Option<&mut FlowValue> {
        // SAFETY: the map's element for this CPU; packet programs run with bottom halves off, one at a time.
        maps::drafts.get_ptr_mut(0).map(|draft| unsafe { &mut *draft })
    }

    #[inline(always)]
    fn insert_pending(&self, key: &FlowKey, value: &FlowValue, new_only: bool) -> bool {
        tables::insert_pending(key, value, new_only)
    }

    #[inline(always)]
    fn establish(&self, key: &FlowKey, value: FlowRef<'_>) -> bool {
        tables::establish(key, value)
    }

    #[inline(always)]
    fn remove_established(&self, key: &FlowKey) {
        tables::remove_established(key);
    }

    #[inline(always)]
    fn remove_pending(&self, key: &FlowKey) {
        tables::remove_pending(key);
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentValue> {
        // SAFETY: one word.
        unsafe { maps::fragments.get(key).copied() }
    }

    #[inline(always)]
    fn set_fragment(&self, key: &FragmentKey, value: &FragmentValue) {
        // A fragment that cannot be remembered is dropped and counted when its next part comes.
        let _ = maps::fragments.insert(key, value, 0);
    }

    #[inline(always)]
    fn search<F: FnMut(u32) -> bool>(&self, tries: u32, found: F) -> bool {
        tables::search(tries, found)
    }

    #[inline(always)]
    fn nanos(&self) -> Nanos {
        tables::nanos()
    }

    #[inline(always)]
    fn source_towards(&self, src: &Addr, dst: &Addr) -> Option<Addr> {
        let mut source = Addr::UNSPECIFIED_V6;
        if source_towards(self.ctx.skb.0, src, dst, &mut source) { Some(source) } else { None }
    }

    #[inline(always)]
    fn bridge_neighbour(&self, src: &Addr, dst: &Addr) -> Neighbour {
        if !self.ctx.is_port {
            return Neighbour::Elsewhere;
        }
        let mut mac = [0; 3];
        match bridge_neighbour(self.ctx.skb.0, src, dst, &mut mac) {
            AT => Neighbour::At(mac),
            UNRESOLVED => Neighbour::Unresolved,
            _ => Neighbour::Elsewhere,
        }
    }

    #[inline(always)]
    fn tracked(&self, tuple: &Tuple) -> Tracked {
        match tracked(self.ctx.skb.0, tuple) {
            TRACKED_PLAIN => Tracked::Plain,
            TRACKED_TRANSLATED => Tracked::Translated,
            _ => Tracked::Unknown,
        }
    }

    #[inline(always)]
    fn has_connected_socket(&self, tuple: &Tuple) -> bool {
        has_connected_socket(self.ctx.skb.0, tuple)
    }
}

// Functions of their own in the object, since their parameters would not fit on their callers' frames: a frame of 512
// bytes has room for one at a time.

const AT: u32 = 1;
const UNRESOLVED: u32 = 2;
const TRACKED_PLAIN: u32 = 1;
const TRACKED_TRANSLATED: u32 = 2;

#[inline(never)]
fn source_towards(skb: *mut __sk_buff, src: &Addr, dst: &Addr, source: &mut Addr) -> bool {
    let skb = SkBuff(skb);
    let mut params = fib_params(src, dst, skb.ifindex());
    // BPF_FIB_LOOKUP_SRC needs Linux 6.7; before, the call fails and the flow is refused and counted.
    let flags = BPF_FIB_LOOKUP_SRC | BPF_FIB_LOOKUP_SKIP_NEIGH;
    match look_up_route(skb, &mut params, flags) {
        // This very packet is too long for the way. That is for the stack to say: it can take a fragment apart.
        BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_FRAG_NEEDED => {}
        _ => return false,
    }
    // SAFETY: the family says which member the kernel wrote.
    *source = unsafe {
        if dst.is_v4() {
            Addr::from_v4_word(params.__bindgen_anon_3.ipv4_src)
        } else {
            Addr(params.__bindgen_anon_3.ipv6_src)
        }
    };
    *source != dst.wildcard()
}

#[inline(never)]
fn bridge_neighbour(skb: *mut __sk_buff, src: &Addr, dst: &Addr, mac: &mut [u16; 3]) -> u32 {
    let skb = SkBuff(skb);
    // SAFETY: plain words; the agent replaces elements as a whole.
    let Some(device) = (unsafe { maps::devices.get(skb.ifindex()) }) else { return 0 };
    let bridge = device.bridge;
    let mut params = fib_params(src, dst, bridge);
    let answer = look_up_route(skb, &mut params, 0);
    if params.ifindex != bridge {
        return 0;
    }
    match answer {
        BPF_FIB_LKUP_RET_SUCCESS => {
            let [a, b, c, d, e, f] = params.dmac;
            *mac = [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]), u16::from_ne_bytes([e, f])];
            AT
        }
        // Too long for the bridge, which would swallow it: this one goes by the stack.
        BPF_FIB_LKUP_RET_NO_NEIGH | BPF_FIB_LKUP_RET_FRAG_NEEDED => UNRESOLVED,
        _ => 0,
    }
}

#[inline(never)]
fn tracked(skb: *mut __sk_buff, tuple: &Tuple) -> u32 {
    let skb = SkBuff(skb);
    let (key, size) = socket_tuple(tuple);
    let mut options = TrackOptions { netns: -1, error: 0, l4proto: tuple.proto.0, dir: 0, reserved: [0; 2] };
    // Two calls: the verifier wants to know the size as a constant at each.
    let found =
        if size == 12 { track_lookup(skb, &key, 12, &mut options) } else { track_lookup(skb, &key, 36, &mut options) };
    if found == 0 {
        return 0;
    }
    let offset = NF_CONN_STATUS.load() as u64;
    // SAFETY: a live `struct nf_conn`, read at a field's offset from the kernel's own type information.
    let status = if offset == 0 { 0 } else { unsafe { ((found + offset) as *const u32).read_volatile() } };
    track_release(found);
    if status & IPS_DST_NAT != 0 { TRACKED_TRANSLATED } else { TRACKED_PLAIN }
}

#[inline(never)]
fn has_connected_socket(skb: *mut __sk_buff, tuple: &Tuple) -> bool {
    let (mut key, size) = socket_tuple(tuple);
    let skb = skb.cast();
    // SAFETY: the context of the running program and a tuple of the given size.
    let socket = unsafe {
        match (tuple.proto == Proto::TCP, size == 12) {
            (true, true) => bpf_sk_lookup_tcp(skb, &raw mut key, 12, BPF_F_CURRENT_NETNS, 0),
            (true, false) => bpf_sk_lookup_tcp(skb, &raw mut key, 36, BPF_F_CURRENT_NETNS, 0),
            (false, true) => bpf_sk_lookup_udp(skb, &raw mut key, 12, BPF_F_CURRENT_NETNS, 0),
            (false, false) => bpf_sk_lookup_udp(skb, &raw mut key, 36, BPF_F_CURRENT_NETNS, 0),
        }
    };
    is_connected(socket)
}
