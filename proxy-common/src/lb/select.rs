//! Which backend: a keyed hash over the slots of a set.

use crate::addr::Addr;
use crate::lb::tuple::Tuple;

/// SipHash-1-3 (Aumasson, Bernstein: SipHash, 2012; the reduced-round form that hash tables use) over 64-bit words.
///
/// A keyed pseudo-random function: who does not know the key cannot steer picks to one backend. The same key and words
/// give the same answer at every hook, for a retransmission, and after a restart.
#[derive(Clone, Copy)]
struct Sip {
    v0: u64,
    v1: u64,
    v2: u64,
    v3: u64,
}

impl Sip {
    #[inline(always)]
    const fn new(key: [u64; 2]) -> Self {
        // "somepseudorandomlygeneratedbytes", the constants of the paper.
        Self {
            v0: key[0] ^ 0x736f_6d65_7073_6575,
            v1: key[1] ^ 0x646f_7261_6e64_6f6d,
            v2: key[0] ^ 0x6c79_6765_6e65_7261,
            v3: key[1] ^ 0x7465_6462_7974_6573,
        }
    }

    #[inline(always)]
    const fn round(mut self) -> Self {
        self.v0 = self.v0.wrapping_add(self.v1);
        self.v2 = self.v2.wrapping_add(self.v3);
        self.v1 = self.v1.rotate_left(13) ^ self.v0;
        self.v3 = self.v3.rotate_left(16) ^ self.v2;
        self.v0 = self.v0.rotate_left(32);
        self.v2 = self.v2.wrapping_add(self.v1);
        self.v0 = self.v0.wrapping_add(self.v3);
        self.v1 = self.v1.rotate_left(17) ^ self.v2;
        self.v3 = self.v3.rotate_left(21) ^ self.v0;
        self.v2 = self.v2.rotate_left(32);
        self
    }

    #[inline(always)]
    const fn word(mut self, word: u64) -> Self {
        self.v3 ^= word;
        self = self.round();
        self.v0 ^= word;
        self
    }

    /// `length` is the number of bytes that were hashed.
    #[inline(always)]
    const fn finish(mut self, length: u64) -> u64 {
        self = self.word(length << 56);
        self.v2 ^= 0xff;
        self = self.round().round().round();
        self.v0 ^ self.v1 ^ self.v2 ^ self.v3
    }

    #[inline(always)]
    const fn addr(self, addr: &Addr) -> Self {
        let [a, b, c, d] = addr.0;
        self.word((b as u64) << 32 | a as u64).word((d as u64) << 32 | c as u64)
    }
}

/// Hash of a packet's tuple.
#[inline(always)]
pub const fn hash_tuple(key: [u64; 2], tuple: &Tuple) -> u64 {
    let ports = (tuple.proto.0 as u64) << 32 | (tuple.dport.0 as u64) << 16 | tuple.sport.0 as u64;
    Sip::new(key).addr(&tuple.src).addr(&tuple.dst).word(ports).finish(40)
}

/// Hash of a socket by its cookie and the service it dials: stable for the socket's life, different for each socket.
#[inline(always)]
pub const fn hash_socket(key: [u64; 2], cookie: u64, service: u32) -> u64 {
    Sip::new(key).word(cookie).word(service as u64).finish(16)
}

/// Position in a set of `count` slots, evenly spread (Lemire: multiply, keep the upper half).
#[inline(always)]
pub const fn position(hash: u64, count: u32) -> u32 {
    (((hash & 0xffff_ffff) * count as u64) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Be16, Proto};
    use proptest::prelude::*;

    #[test]
    fn siphash_matches_the_reference_for_one_word() {
        // std's `DefaultHasher` is SipHash-1-3 with a zero key; hashing a u64 feeds its eight bytes.
        use std::hash::Hasher;
        let mut one_three = std::hash::DefaultHasher::new();
        one_three.write(&7u64.to_ne_bytes());
        one_three.write(&9u64.to_ne_bytes());
        assert_eq!(Sip::new([0, 0]).word(7).word(9).finish(16), one_three.finish());
    }

    proptest! {
        #[test]
        fn positions_are_inside(hash in any::<u64>(), count in 1u32..) {
            prop_assert!(position(hash, count) < count);
        }
    }

    #[test]
    fn picks_spread_evenly() {
        let mut seen = [0u32; 7];
        for port in 0..7000u16 {
            let tuple = Tuple {
                src: Addr::from_v4_word(0x0101_0a0a),
                dst: Addr::from_v4_word(0x0100_600a),
                sport: Be16(port),
                dport: Be16(80),
                proto: Proto::TCP,
            };
            seen[position(hash_tuple([1, 2], &tuple), 7) as usize] += 1;
        }
        // 1000 expected each, standard deviation 29: six of them.
        assert!(seen.iter().all(|&n| (824..1176).contains(&n)), "{seen:?}");
    }
}
