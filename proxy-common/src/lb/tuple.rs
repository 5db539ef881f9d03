//! The five values that name a connection, and the flow keys made of them.

use crate::abi::flow::FlowKey;
use crate::addr::{Addr, Be16, Proto};

/// A connection as one packet shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Tuple {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port.
    pub sport: Be16,
    /// Destination port.
    pub dport: Be16,
    /// TCP or UDP.
    pub proto: Proto,
}

impl Tuple {
    /// The same connection seen from the other side.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self { src: self.dst, dst: self.src, sport: self.dport, dport: self.sport, proto: self.proto }
    }

    /// Key of the front entry; `self` goes from the client to the frontend.
    #[inline(always)]
    pub const fn front_key(&self) -> FlowKey {
        self.key(FlowKey::FRONT)
    }

    /// Key of the snat entry; `self` goes from the backend to the rewritten source.
    #[inline(always)]
    pub const fn snat_key(&self) -> FlowKey {
        self.key(FlowKey::SNAT)
    }

    /// Key of the plain entry, the same for both directions, and whether the source is its first end.
    #[inline(always)]
    pub fn plain_key(&self) -> (FlowKey, bool) {
        let src_first = (self.src, self.sport) <= (self.dst, self.dport);
        let key = if src_first { self.key(FlowKey::PLAIN) } else { self.reversed().key(FlowKey::PLAIN) };
        (key, src_first)
    }

    #[inline(always)]
    const fn key(&self, kind: u8) -> FlowKey {
        FlowKey {
            a: self.src,
            b: self.dst,
            a_port: self.sport,
            b_port: self.dport,
            proto: self.proto.0,
            kind,
            reserved: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn plain_keys_are_the_same_for_both_directions(a in any::<[u32; 4]>(), b in any::<[u32; 4]>(), p in any::<u16>(), q in any::<u16>()) {
            let tuple = Tuple { src: Addr(a), dst: Addr(b), sport: Be16(p), dport: Be16(q), proto: Proto::TCP };
            let (forward, src_first) = tuple.plain_key();
            let (reply, dst_first) = tuple.reversed().plain_key();
            prop_assert_eq!(forward, reply);
            prop_assert!(src_first != dst_first || (a, p) == (b, q));
        }
    }
}
