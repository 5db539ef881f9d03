//! Marks of ports that flows keep: programs set them, and the sweep takes back those that no flow uses any more.
//!
//! Marks lie in two generations, of which either counts (`proxy_common::abi::address::KEPT_WORDS`). The sweep turns the
//! generation, waits for the programs that set marks in the old one, goes through all flows, carries the marks of their
//! ports over and clears the old generation. A program that opens a flow meanwhile marks its port in the new one, so no
//! mark is missing at any moment. If the sweep is interrupted, marks stay that nobody needs, until the next time.
//! May touch: the words it is given.

use std::sync::atomic::{AtomicU64, Ordering};

use proxy_common::abi::address::{KEPT_GENERATION, KEPT_WORDS, PortUse, kept_index};
use proxy_common::abi::flow::FlowKey;

/// The marks of all ports of a word, in generation 0.
const GENERATION: u64 = u64::MAX / 15 * (PortUse::NODE_PORT | PortUse::SNAT);

/// What flows use ports for, as marks of generation 0.
#[derive(Debug, Clone)]
pub struct Users(Box<[u64]>);

impl Default for Users {
    fn default() -> Self {
        Self(vec![0; KEPT_WORDS as usize].into())
    }
}

impl Users {
    /// Takes the entry of a flow: its frontend may be a NodePort, its rewritten source a port that was kept.
    pub fn see(&mut self, key: &FlowKey) {
        let usage = match key.kind {
            FlowKey::FRONT => PortUse::NODE_PORT,
            FlowKey::SNAT => PortUse::SNAT,
            _ => return,
        };
        let (word, shift) = kept_index(key.b_port.host());
        self.0[word as usize] |= usage << shift;
    }
}

/// Turns the generation in which programs set marks.
pub fn begin(words: &[AtomicU64]) {
    words[KEPT_WORDS as usize].fetch_xor(1, Ordering::AcqRel);
}

/// Carries the marks of used ports over from the generation before the current one, and clears it. Returns how many uses
/// ended.
pub fn finish(words: &[AtomicU64], users: &Users) -> usize {
    let is_second = words[KEPT_WORDS as usize].load(Ordering::Acquire) & 1 == 1;
    let (old, new) = if is_second { (0, KEPT_GENERATION) } else { (KEPT_GENERATION, 0) };
    let mut ended = 0;
    for (word, used) in words.iter().zip(&users.0) {
        let bits = word.load(Ordering::Acquire);
        let marked = bits >> old & GENERATION;
        if marked != 0 {
            let carried = marked & used;
            word.fetch_or(carried << new, Ordering::AcqRel);
            word.fetch_and(!(GENERATION << old), Ordering::AcqRel);
            ended += (marked & !used & !(bits >> new)).count_ones() as usize;
        }
    }
    ended
}

#[cfg(test)]
mod tests {
    use super::*;
    use proxy_common::addr::{Addr, Port, Proto};
    use proxy_common::lb::tuple::Tuple;

    fn words() -> Vec<AtomicU64> {
        (0..=KEPT_WORDS).map(|_| AtomicU64::new(0)).collect()
    }

    /// As a program does it.
    fn mark(words: &[AtomicU64], port: u16, usage: u64) {
        let generation = words[KEPT_WORDS as usize].load(Ordering::Relaxed) as u32 & 1;
        let (word, shift) = kept_index(Port(port));
        words[word as usize].fetch_or(usage << shift << (generation * KEPT_GENERATION), Ordering::Relaxed);
    }

    /// As a program sees it.
    fn uses(words: &[AtomicU64], port: u16) -> u64 {
        let (word, shift) = kept_index(Port(port));
        let bits = words[word as usize].load(Ordering::Relaxed) >> shift;
        (bits | bits >> KEPT_GENERATION) & 3
    }

    fn flow(port: u16) -> Tuple {
        let addr = Addr::UNSPECIFIED_V4;
        Tuple { src: addr, dst: addr, sport: Port(1).be(), dport: Port(port).be(), proto: Proto::TCP }
    }

    #[test]
    fn marks_of_living_flows_stay_and_the_others_go() {
        let words = words();
        let marks = [(31_000, PortUse::NODE_PORT), (31_001, PortUse::NODE_PORT), (7, PortUse::SNAT), (65_535, 3)];
        marks.iter().for_each(|(port, usage)| mark(&words, *port, *usage));
        // In both generations one after the other.
        for ended in [3, 0, 0] {
            begin(&words);
            let mut users = Users::default();
            let (node_port, snat) = (flow(31_000).front_key(), flow(65_535).snat_key());
            [node_port, snat, flow(7).front_key(), flow(8).plain_key().0].iter().for_each(|key| users.see(key));
            assert_eq!(finish(&words, &users), ended);
            assert_eq!([31_000, 31_001, 7, 65_535].map(|port| uses(&words, port)), [1, 0, 0, PortUse::SNAT]);
        }
    }

    #[test]
    fn a_mark_that_is_set_while_flows_are_looked_at_stays_although_its_flow_was_missed() {
        let words = words();
        mark(&words, 7, PortUse::SNAT);
        begin(&words);
        mark(&words, 7, PortUse::SNAT);
        mark(&words, 9, PortUse::SNAT);
        assert_eq!(finish(&words, &Users::default()), 0);
        assert_eq!([uses(&words, 7), uses(&words, 9)], [PortUse::SNAT; 2]);
    }

    #[test]
    fn an_interrupted_sweep_loses_no_mark() {
        let words = words();
        mark(&words, 7, PortUse::SNAT);
        begin(&words);
        mark(&words, 9, PortUse::SNAT);
        // The next one begins although this one did not finish.
        begin(&words);
        let mut users = Users::default();
        [7, 9].iter().for_each(|port| users.see(&flow(*port).snat_key()));
        finish(&words, &users);
        assert_eq!([uses(&words, 7), uses(&words, 9)], [PortUse::SNAT; 2]);
    }
}
