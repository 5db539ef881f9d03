//! The life of a flow: its changing words, how TCP control bits move it, and how long it is kept.

use crate::addr::Proto;
use crate::wire::header::tcp;

/// Seconds of the datapath's clock: CLOCK_MONOTONIC nanoseconds shifted right by 30 (1.07 s each), so that no division
/// is needed per packet. Wraps after 146 years.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Seconds(pub u32);

impl Seconds {
    /// From CLOCK_MONOTONIC nanoseconds.
    #[inline(always)]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self((nanos >> 30) as u32)
    }

    /// How long before `now` this was.
    #[inline(always)]
    pub const fn age(self, now: Self) -> u32 {
        now.0.saturating_sub(self.0)
    }

    /// `seconds` in this clock's unit, rounded down.
    #[inline(always)]
    pub const fn span(seconds: u32) -> u32 {
        ((seconds as u64 * 1_000_000_000) >> 30) as u32
    }
}

/// The datapath's clock as fine as it goes: CLOCK_MONOTONIC_COARSE, nanoseconds that advance by the kernel's ticks (1 to 10
/// ms).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Nanos(pub u64);

/// The changing word of a pending snat entry: how long its port has been held, and whether it is in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hold(pub u64);

impl Hold {
    /// A packet of the client has left by it. Unless that is so, what comes to the port is no reply to us: the node's own
    /// masquerade may use the same one. (The bit is below the resolution of any clock tick.)
    const LEFT: u64 = 1;

    /// Taken just now.
    #[inline(always)]
    pub const fn claimed(now: Nanos) -> Self {
        Self(now.0 & !Self::LEFT)
    }

    /// The same, in use.
    #[inline(always)]
    pub const fn left(self) -> Self {
        Self(self.0 | Self::LEFT)
    }

    /// True if it is in use.
    #[inline(always)]
    pub const fn has_left(self) -> bool {
        self.0 & Self::LEFT != 0
    }
}

/// The changing word of a plain entry: when a packet was last seen, and how far the connection has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hot {
    /// Last packet.
    pub seen: Seconds,
    /// State bits.
    pub state: u32,
}

impl Hot {
    /// The client has sent its FIN.
    pub const FIN_CLIENT: u32 = 1;
    /// The backend has sent its FIN.
    pub const FIN_BACKEND: u32 = 1 << 1;
    /// The backend has sent RST, and nothing since.
    pub const RESET_BACKEND: u32 = 1 << 2;
    /// The flow has been promoted: its return path is proven.
    pub const ESTABLISHED: u32 = 1 << 3;
    /// TCP: the backend has said something else than the answer to the SYN: the tuple belongs to another connection.
    pub const CLASH: u32 = 1 << 4;
    /// TCP: the client has seen such an answer, and sends its SYN again (or not, but is not to see another).
    pub const TOLD: u32 = 1 << 5;
    /// The client has sent RST, and neither side anything since. Anybody can send that in the client's name; only the
    /// backend knows whether its sequence number is right (RFC 5961 section 3), so the connection may live on.
    pub const RESET_CLIENT: u32 = 1 << 6;
    /// A packet of the client has left with the source that we rewrote. See [`Hold::has_left`].
    pub const LEFT: u32 = 1 << 7;

    /// From the stored word.
    #[inline(always)]
    pub const fn unpack(word: u64) -> Self {
        Self { seen: Seconds((word >> 32) as u32), state: word as u32 }
    }

    /// To the stored word.
    #[inline(always)]
    pub const fn pack(self) -> u64 {
        (self.seen.0 as u64) << 32 | self.state as u64
    }

    /// True once the connection is over: reset by the backend, or FIN from both sides. A new SYN starts a new flow then; on
    /// one that only the client has reset, it follows this flow to the backend, which knows.
    #[inline(always)]
    pub const fn is_finished(self) -> bool {
        self.state & Self::RESET_BACKEND != 0
            || self.state & Self::FIN_CLIENT != 0 && self.state & Self::FIN_BACKEND != 0
    }

    /// The state after a packet with these control bits.
    #[inline(always)]
    #[must_use]
    pub const fn after(self, now: Seconds, tcp_flags: u8, from_client: bool) -> Self {
        let mut state = self.state;
        if tcp_flags & tcp::RST != 0 {
            state |= if from_client { Self::RESET_CLIENT } else { Self::RESET_BACKEND };
        } else if !from_client {
            // The backend has believed the client's reset if it says SYN-ACK now, and not if it says anything else.
            if state & Self::RESET_CLIENT != 0 && tcp_flags & tcp::SYN != 0 {
                state &= !(Self::FIN_CLIENT | Self::FIN_BACKEND);
            }
            state &= !(Self::RESET_CLIENT | Self::RESET_BACKEND);
        } else if tcp_flags & tcp::SYN == 0 {
            state &= !Self::RESET_CLIENT;
        }
        if tcp_flags & tcp::FIN != 0 {
            state |= if from_client { Self::FIN_CLIENT } else { Self::FIN_BACKEND };
        }
        Self { seen: now, state }
    }
}

/// What proves that replies come back to us, kept until the flow is promoted: what the client asked, then what the backend
/// answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Proof(pub u64);

impl Proof {
    /// Nothing yet.
    pub const NONE: Self = Self(0);
    /// UDP: the backend has answered.
    pub const ANSWERED: Self = Self(1 << 32);

    /// TCP: the client's SYN carried `sequence` (wire order); the answer must acknowledge the next number.
    #[inline(always)]
    pub const fn syn(sequence: u32) -> Self {
        Self(Self::ASKED | u32::from_be(sequence).wrapping_add(1) as u64)
    }

    const ASKED: u64 = 1 << 33;

    /// True if what waits for its answer is another SYN than the one with `sequence` (wire order).
    #[inline(always)]
    pub const fn is_other_syn(self, sequence: u32) -> bool {
        self.0 & Self::ASKED != 0 && self.0 as u32 != u32::from_be(sequence).wrapping_add(1)
    }

    /// True if a segment with this acknowledgment number (wire order) may answer the SYN.
    #[inline(always)]
    pub const fn is_answered_by(self, acknowledgment: u32) -> bool {
        // A little beyond, for data in the SYN (TCP Fast Open, RFC 7413).
        self.0 & Self::ASKED == 0 || u32::from_be(acknowledgment).wrapping_sub(self.0 as u32) < 1 << 14
    }

    /// TCP: the backend's SYN-ACK carried `sequence` (wire order); the client must acknowledge the next number.
    #[inline(always)]
    pub const fn syn_ack(sequence: u32) -> Self {
        Self(1 << 32 | u32::from_be(sequence).wrapping_add(1) as u64)
    }

    /// True if the backend has answered.
    #[inline(always)]
    pub const fn is_some(self) -> bool {
        self.0 & Self::ANSWERED.0 != 0
    }

    /// True if a client's TCP segment with this acknowledgment number (wire order) completes the handshake, or goes on
    /// after it (some segments may have been lost or reordered in between).
    #[inline(always)]
    pub const fn is_met_by(self, acknowledgment: u32) -> bool {
        // A little beyond, for data that a server sends before the handshake ends (TCP Fast Open, RFC 7413): an initial
        // window. A forger must hit 2^14 of 2^32.
        self.is_some() && u32::from_be(acknowledgment).wrapping_sub(self.0 as u32) < 1 << 14
    }
}

/// How long a flow without packets is kept, in seconds.
///
/// Each is at most what the kernel's conntrack keeps for the same flow (net/netfilter/nf_conntrack_proto_{tcp,udp}.c
/// defaults, or kube-proxy's settings), so that the kernel never forgets a flow that we still translate.
pub mod lifetime {
    /// kube-proxy sets 24 h in the kernel, whose own default is 5 days.
    pub const TCP_ESTABLISHED: u32 = 23 * 3600;
    /// One side has closed. kube-proxy raises the kernel's CLOSE_WAIT to one hour for clients that read on.
    pub const TCP_HALF_CLOSED: u32 = 3600;
    /// As long as Linux keeps TIME_WAIT: a source port is not used anew towards a backend that still remembers it.
    pub const TCP_FINISHED: u32 = 60;
    /// After a reset in the client's name: if it was forged, the connection survives it unless it is silent for that long.
    /// (Longer, and clients that end all their connections so would use up the source ports towards a backend.)
    pub const TCP_RESET: u32 = 60;
    /// The kernel's SYN_RECV is 60, SYN_SENT 120.
    pub const TCP_OPENING: u32 = 55;
    /// The kernel: 120 once answered.
    pub const UDP_ANSWERED: u32 = 110;
    /// The kernel: 30.
    pub const UDP_OPENING: u32 = 28;
}

/// How long (in [`Seconds`] units) a flow is kept after its last packet.
#[inline(always)]
pub const fn keep(proto: Proto, hot: Hot) -> u32 {
    let established = hot.state & Hot::ESTABLISHED != 0;
    let seconds = if proto.0 != Proto::TCP.0 {
        if established { lifetime::UDP_ANSWERED } else { lifetime::UDP_OPENING }
    } else if hot.is_finished() {
        lifetime::TCP_FINISHED
    } else if !established {
        lifetime::TCP_OPENING
    } else if hot.state & Hot::RESET_CLIENT != 0 {
        lifetime::TCP_RESET
    } else if hot.state & (Hot::FIN_CLIENT | Hot::FIN_BACKEND) != 0 {
        lifetime::TCP_HALF_CLOSED
    } else {
        lifetime::TCP_ESTABLISHED
    };
    Seconds::span(seconds)
}

/// True if a plain entry has outlived its flow.
#[inline(always)]
pub const fn is_expired(proto: Proto, hot: Hot, now: Seconds) -> bool {
    hot.seen.age(now) > keep(proto, hot)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: Hot = Hot { seen: Seconds(100), state: Hot::ESTABLISHED };

    #[test]
    fn fin_from_both_sides_or_a_reset_by_the_backend_finishes_a_flow() {
        let half = OPEN.after(Seconds(101), tcp::FIN | tcp::ACK, true);
        assert!(!half.is_finished());
        assert!(!half.after(Seconds(102), tcp::FIN, true).is_finished(), "a repeated FIN is no answer");
        assert!(half.after(Seconds(102), tcp::FIN | tcp::ACK, false).is_finished());
        let reset = OPEN.after(Seconds(101), tcp::RST, false);
        assert!(reset.is_finished());
        assert!(reset.after(Seconds(102), tcp::ACK, true).is_finished(), "it may have been under way");
        assert!(!reset.after(Seconds(102), tcp::ACK, false).is_finished(), "it was not the backend's");
    }

    #[test]
    fn a_reset_in_the_clients_name_is_believed_when_the_backend_does() {
        let reset = OPEN.after(Seconds(101), tcp::FIN | tcp::ACK, true).after(Seconds(101), tcp::RST, true);
        assert!(!reset.is_finished());
        for from_client in [false, true] {
            let state = reset.after(Seconds(101), tcp::ACK, from_client).state;
            assert_eq!(state, Hot::ESTABLISHED | Hot::FIN_CLIENT, "the connection lives");
        }
        let again = reset.after(Seconds(101), tcp::SYN, true);
        assert_eq!(again.state, reset.state, "the backend has not answered yet");
        assert_eq!(again.after(Seconds(101), tcp::SYN | tcp::ACK, false).state, Hot::ESTABLISHED, "a new connection");
    }

    #[test]
    fn a_flow_lives_as_long_as_its_state_says() {
        let at = |seconds: u32| Seconds(100 + Seconds::span(seconds));
        assert!(!is_expired(Proto::TCP, OPEN, at(lifetime::TCP_ESTABLISHED)));
        assert!(is_expired(Proto::TCP, OPEN, at(lifetime::TCP_ESTABLISHED + 2)));
        assert!(is_expired(Proto::UDP, OPEN, at(lifetime::UDP_ANSWERED + 2)));
        let finished = OPEN.after(Seconds(100), tcp::RST, false);
        assert!(!is_expired(Proto::TCP, finished, at(lifetime::TCP_FINISHED)));
        assert!(is_expired(Proto::TCP, finished, at(lifetime::TCP_FINISHED + 2)));
        let reset = OPEN.after(Seconds(100), tcp::RST, true);
        assert!(!is_expired(Proto::TCP, reset, at(lifetime::TCP_RESET)));
        assert!(is_expired(Proto::TCP, reset, at(lifetime::TCP_RESET + 2)));
    }

    #[test]
    fn only_the_right_acknowledgment_proves_a_handshake() {
        let proof = Proof::syn_ack(0xffff_ffff_u32.to_be());
        assert!(proof.is_met_by(0));
        assert!(proof.is_met_by(1000u32.to_be()));
        assert!(!proof.is_met_by(0xffff_ffff_u32.to_be()));
        assert!(!Proof::NONE.is_met_by(0));
    }

    #[test]
    fn only_what_acknowledges_the_syn_answers_it() {
        let proof = Proof::syn(0xffff_ffff_u32.to_be());
        assert!(!proof.is_some());
        assert!(proof.is_answered_by(0));
        assert!(proof.is_answered_by(1400u32.to_be()), "data in the SYN");
        assert!(!proof.is_answered_by(0xffff_ffff_u32.to_be()));
        assert!(!proof.is_other_syn(0xffff_ffff_u32.to_be()));
        assert!(proof.is_other_syn(7u32.to_be()));
        let answered = Proof::syn_ack(500u32.to_be());
        assert!(!answered.is_other_syn(7u32.to_be()) && answered.is_answered_by(0), "nothing to compare with");
    }

    #[test]
    fn words_survive_packing() {
        let hot = Hot { seen: Seconds(0xdead_beef), state: Hot::RESET_CLIENT | Hot::ESTABLISHED };
        assert_eq!(Hot::unpack(hot.pack()), hot);
    }
}
