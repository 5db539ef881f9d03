//! The packet of a TC program, read in place, changed by helpers only: those keep partial checksums, clones and fragments
//! right. Headers nearly always lie in the linear part; where they do not, the packet is pulled and looked at again.

use aya_ebpf::bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::generated::{bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_pull_data, bpf_skb_store_bytes};
use proxy_common::lb::rewrite::{Edit, L4};
use proxy_common::wire::Packet;
use proxy_common::wire::checksum::Diff;
use proxy_common::wire::header::Header;

/// `BPF_F_IPV6` (Linux 6.16): without it a pseudo-header change of IPv6 spoils a checksum that the device computed
/// (CHECKSUM_COMPLETE). Kernels that do not know it answer EINVAL.
const BPF_F_IPV6: u64 = 1 << 7;

/// Where headers end at the latest: Ethernet with two tags, IPv6 with some extensions, ICMPv6, a quote of the same, TCP.
const HEADERS: u32 = 256;

/// No header begins beyond this offset.
const FARTHEST: usize = 4096;

/// A packet in a TC program.
#[derive(Clone, Copy)]
pub struct SkBuff(pub *mut __sk_buff);

impl SkBuff {
    /// Length on the wire, all fragments.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        // SAFETY: the context of the running program.
        unsafe { (*self.0).len }
    }

    /// Device the packet is on.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: the context of the running program.
        unsafe { (*self.0).ifindex }
    }

    /// PACKET_HOST, PACKET_BROADCAST and so on (linux/if_packet.h).
    #[inline(always)]
    pub fn packet_type(&self) -> u32 {
        // SAFETY: the context of the running program.
        unsafe { (*self.0).pkt_type }
    }

    /// Start and end of the linear part.
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        let (start, end): (usize, usize);
        // Loads that LLVM does not look into: it would move plain ones into the callers of functions that are not inlined,
        // as 32-bit arguments ("invalid mem access 'scalar'"), and split volatile ones into address and load ("dereference
        // of modified ctx ptr"); both seen with Linux 6.18 and LLVM 22.
        // SAFETY: the context of the running program, at the offsets of two of its fields.
        unsafe {
            core::arch::asm!(
                "{start} = *(u32 *)({ctx} + {data})",
                "{end} = *(u32 *)({ctx} + {data_end})",
                ctx = in(reg) self.0,
                data = const core::mem::offset_of!(__sk_buff, data),
                data_end = const core::mem::offset_of!(__sk_buff, data_end),
                start = out(reg) start,
                end = lateout(reg) end,
                options(pure, readonly, nostack),
            );
        }
        (start, end)
    }

    /// True if headers may lie beyond the linear part.
    #[inline(always)]
    pub fn is_short(&self) -> bool {
        let (start, end) = self.bounds();
        end - start < HEADERS as usize && end - start < self.len() as usize
    }

    /// Makes the first bytes linear.
    #[inline(always)]
    pub fn pull(&self) {
        let length = if self.len() < HEADERS { self.len() } else { HEADERS };
        // SAFETY: the context of the running program. What cannot be pulled stays unread, and passes.
        let _ = unsafe { bpf_skb_pull_data(self.0, length) };
    }

    /// The first word of the control block, which tail calls keep.
    #[inline(always)]
    pub fn control(&self) -> u32 {
        // SAFETY: the context of the running program.
        unsafe { (&raw const (*self.0).cb[0]).read_volatile() }
    }

    /// Sets the first word of the control block.
    #[inline(always)]
    pub fn set_control(&self, word: u32) {
        // SAFETY: the context of the running program.
        unsafe { (&raw mut (*self.0).cb[0]).write_volatile(word) }
    }

    #[inline(always)]
    fn store<T>(&mut self, offset: usize, value: &T) -> bool {
        // SAFETY: `value` is readable for its size; the helper checks the packet's bounds.
        unsafe {
            bpf_skb_store_bytes(self.0, offset as u32, core::ptr::from_ref(value).cast(), size_of::<T>() as u32, 0) == 0
        }
    }
}

impl Packet for SkBuff {
    #[inline(always)]
    fn load<T: Header>(&self, offset: usize) -> Option<T> {
        // The verifier follows packet offsets below 64 KiB only (MAX_PACKET_OFF); what was stored as u16 may be beyond.
        if offset > FARTHEST {
            return None;
        }
        let (start, end) = self.bounds();
        if start + offset + size_of::<T>() <= end {
            // SAFETY: in bounds by the test above; headers are integers, for which any bytes are a value, and this target
            // loads from any address (the verifier allows it for packets where the machine does).
            Some(unsafe { ((start + offset) as *const T).read() })
        } else {
            None
        }
    }
}

impl Edit for SkBuff {
    #[inline(always)]
    fn store_u16(&mut self, offset: usize, value: u16) -> bool {
        self.store(offset, &value)
    }

    #[inline(always)]
    fn store_u32(&mut self, offset: usize, value: u32) -> bool {
        self.store(offset, &value)
    }

    #[inline(always)]
    fn store_words(&mut self, offset: usize, value: &[u32; 4]) -> bool {
        self.store(offset, value)
    }

    #[inline(always)]
    fn update_l3(&mut self, offset: usize, diff: Diff) -> bool {
        // SAFETY: the context of the running program; size 0 means that `to` is a difference.
        unsafe { bpf_l3_csum_replace(self.0, offset as u32, 0, diff.to_u32() as u64, 0) == 0 }
    }

    #[inline(always)]
    fn update_l4(&mut self, offset: usize, diff: Diff, how: L4) -> bool {
        let mut flags = 0;
        if how.pseudo {
            flags |= BPF_F_PSEUDO_HDR as u64;
        }
        if how.zero_means_none {
            flags |= BPF_F_MARK_MANGLED_0 as u64;
        }
        let diff = diff.to_u32() as u64;
        // SAFETY: the context of the running program; size 0 in the flags means that `to` is a difference.
        unsafe {
            if how.pseudo && how.v6 && bpf_l4_csum_replace(self.0, offset as u32, 0, diff, flags | BPF_F_IPV6) == 0 {
                return true;
            }
            bpf_l4_csum_replace(self.0, offset as u32, 0, diff, flags) == 0
        }
    }
}
