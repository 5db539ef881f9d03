//! The Internet checksum: RFC 1071 (definition), RFC 1624 (incremental update).
//!
//! Sums are kept as 32 or 64 bits of one's complement arithmetic over words as they lie in memory: byte order cancels
//! out (RFC 1071, section 2, B), so nothing is swapped here.

/// Folds a one's complement sum to 16 bits.
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// A change of checksummed words, as a 32-bit one's complement sum: what the kernel's `csum_diff` returns.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Diff(pub u64);

impl Diff {
    /// No change.
    pub const NONE: Self = Self(0);

    /// `self` and one 32-bit word `old` that became `new`.
    #[inline(always)]
    #[must_use]
    pub const fn word(self, old: u32, new: u32) -> Self {
        Self(self.0 + (!old) as u64 + new as u64)
    }

    /// `self` and one 16-bit number `old` that became `new`; it must start at an even offset of the checksummed data.
    #[inline(always)]
    #[must_use]
    pub const fn half(self, old: u16, new: u16) -> Self {
        Self(self.0 + (!old) as u64 + new as u64)
    }

    /// `self` and four words.
    #[inline(always)]
    #[must_use]
    pub const fn words(self, old: &[u32; 4], new: &[u32; 4]) -> Self {
        self.word(old[0], new[0]).word(old[1], new[1]).word(old[2], new[2]).word(old[3], new[3])
    }

    /// The change as 32 bits, for the kernel's checksum helpers.
    #[inline(always)]
    pub const fn to_u32(self) -> u32 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        ((sum & 0xffff_ffff) + (sum >> 32)) as u32
    }

    /// The checksum field `old` after this change (RFC 1624, equation 3).
    #[inline(always)]
    pub const fn apply(self, old: u16) -> u16 {
        !fold((!old) as u64 + self.to_u32() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn checksum(data: &[u16]) -> u16 {
        !fold(data.iter().map(|&word| u64::from(word)).sum())
    }

    proptest! {
        #[test]
        fn an_update_equals_the_sum_made_anew(
            mut data in proptest::collection::vec(any::<u16>(), 8..64),
            new in any::<[u32; 4]>(),
            port in any::<u16>(),
        ) {
            // A header sum is never over all zero data in practice; one's complement has two zeros there.
            data[7] |= 1;
            let before = checksum(&data);
            let word = |data: &[u16], i: usize| u32::from(data[2 * i]) | u32::from(data[2 * i + 1]) << 16;
            let old = [word(&data, 0), word(&data, 1), word(&data, 2), 0];
            let diff = Diff::NONE.words(&old, &[new[0], new[1], new[2], 0]).half(data[6], port);
            for i in 0..3 {
                data[2 * i] = new[i] as u16;
                data[2 * i + 1] = (new[i] >> 16) as u16;
            }
            data[6] = port;
            prop_assert_eq!(diff.apply(before), checksum(&data));
        }
    }
}
