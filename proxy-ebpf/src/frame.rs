//! The packet of an XDP program: read and changed in place, checksums complete.
//!
//! A frame of several buffers (jumbo frames, Linux 5.18) is looked at in its first, where drivers put the headers: what lies
//! beyond reads as the end of the packet, and the frame passes.

use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::generated::bpf_xdp_get_buff_len;
use proxy_common::lb::rewrite::{Edit, L4};
use proxy_common::wire::Packet;
use proxy_common::wire::checksum::Diff;
use proxy_common::wire::header::Header;

/// No header begins beyond this offset.
const FARTHEST: usize = 4096;

/// A packet in an XDP program.
#[derive(Clone, Copy)]
pub struct Frame(pub *mut xdp_md);

impl Frame {
    /// Length of the frame, all buffers.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        // SAFETY: the context of the running program.
        unsafe { bpf_xdp_get_buff_len(self.0) as u32 }
    }

    /// Device the packet came by.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: the context of the running program.
        unsafe { (*self.0).ingress_ifindex }
    }

    /// Start and end. Opaque loads for the reasons told in `packet.rs`.
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        let (start, end): (usize, usize);
        // SAFETY: the context of the running program, at the offsets of two of its fields.
        unsafe {
            core::arch::asm!(
                "{start} = *(u32 *)({ctx} + {data})",
                "{end} = *(u32 *)({ctx} + {data_end})",
                ctx = in(reg) self.0,
                data = const core::mem::offset_of!(xdp_md, data),
                data_end = const core::mem::offset_of!(xdp_md, data_end),
                start = out(reg) start,
                end = lateout(reg) end,
                options(pure, readonly, nostack),
            );
        }
        (start, end)
    }

    /// Where `T` lies at `offset`, if it is in bounds.
    #[inline(always)]
    pub fn at<T>(&self, offset: usize) -> Option<*mut T> {
        if offset > FARTHEST {
            return None;
        }
        let (start, end) = self.bounds();
        if start + offset + size_of::<T>() <= end { Some((start + offset) as *mut T) } else { None }
    }

    /// Stores a value that is plain integers.
    #[inline(always)]
    pub fn put<T>(&mut self, offset: usize, value: T) -> bool {
        match self.at::<T>(offset) {
            Some(place) => {
                // SAFETY: in bounds, and this target stores to any address.
                unsafe { place.write(value) };
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn update(&mut self, offset: usize, diff: Diff, zero_means_none: bool) -> bool {
        let Some(place) = self.at::<u16>(offset) else { return false };
        // SAFETY: in bounds.
        let old = unsafe { place.read() };
        if zero_means_none && old == 0 {
            return true;
        }
        let new = diff.apply(old);
        let new = if zero_means_none && new == 0 { 0xffff } else { new };
        // SAFETY: in bounds.
        unsafe { place.write(new) };
        true
    }
}

impl Packet for Frame {
    #[inline(always)]
    fn load<T: Header>(&self, offset: usize) -> Option<T> {
        // SAFETY: in bounds; headers are integers, for which any bytes are a value.
        self.at::<T>(offset).map(|place| unsafe { place.read() })
    }
}

impl Edit for Frame {
    #[inline(always)]
    fn store_u16(&mut self, offset: usize, value: u16) -> bool {
        self.put(offset, value)
    }

    #[inline(always)]
    fn store_u32(&mut self, offset: usize, value: u32) -> bool {
        self.put(offset, value)
    }

    #[inline(always)]
    fn store_words(&mut self, offset: usize, value: &[u32; 4]) -> bool {
        self.put(offset, *value)
    }

    #[inline(always)]
    fn update_l3(&mut self, offset: usize, diff: Diff) -> bool {
        self.update(offset, diff, false)
    }

    #[inline(always)]
    fn update_l4(&mut self, offset: usize, diff: Diff, how: L4) -> bool {
        self.update(offset, diff, how.zero_means_none)
    }
}
