//! Two programs that let a third one run once where a packet meets both: how a device goes from tcx to clsact, or back,
//! without a packet that is translated twice or not at all.
//!
//! ```text
//!  to clsact   tcx: first     ·   clsact: second, tcx leaves   ·   clsact: the program itself
//!  to tcx      clsact: second     tcx: first                   ·   clsact leaves, tcx: the program itself
//! ```
//! On a hook tcx runs before clsact, with nothing of the stack in between. The first gate leaves a word in the packet's
//! control block and goes on in the program; the second one, if it finds that word, passes, else it goes on likewise. At a `·`
//! packets that are between the two must have arrived before anything else changes ([`maps::wait_for_programs`]).
//!
//! To run the program twice would not do: at the device where a flow was opened, what looks like a translated packet is taken
//! for another connection with the same ends.
//! May touch: kernel objects, and the pin of the map by which the gates find the program: an agent that dies half-way leaves
//! them at work. It goes with the continuations of earlier programs.
//!
//! [`maps::wait_for_programs`]: super::maps::wait_for_programs

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use super::pins::Pins;
use super::sys::{self, Instruction};

/// The gates before a program.
pub struct Gates {
    /// For the hook that a packet meets first: tcx.
    pub first: OwnedFd,
    /// For the other one: clsact.
    pub second: OwnedFd,
    _array: OwnedFd,
}

impl Gates {
    /// Gates before `program`, for one hook of any devices.
    pub fn new(program: BorrowedFd<'_>, pins: &Pins) -> io::Result<Self> {
        let array = sys::new_program_array()?;
        sys::map_update(array.as_fd(), &0u32, &(program.as_raw_fd() as u32))?;
        let id = sys::map_info(array.as_fd())?.id;
        // The kernel empties the map when userspace lets go of it.
        sys::pin(array.as_fd(), &pins.continuations().join(id.to_string()))?;
        let mut word = [0; 4];
        // Nothing else that happens to lie in a control block is this word.
        sys::random(&mut word)?;
        let word = i32::from_ne_bytes(word);
        let load = |gate: &[Instruction]| sys::load_classifier(gate, c"gate");
        let (first, second) = (load(&first(word, array.as_fd()))?, load(&second(word, array.as_fd()))?);
        Ok(Self { first, second, _array: array })
    }
}

// Registers.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const SECOND: u8 = 2;
const THIRD: u8 = 3;
const KEPT: u8 = 6;

// Offsets in `struct __sk_buff` (linux/bpf.h). The programs keep theirs in the first word of the control block.
const IFINDEX: i16 = 40;
const LAST_OF_CB: i16 = 64;

// Operations (linux/bpf.h, linux/bpf_common.h).
const LOAD_WORD: u8 = 0x61;
const STORE_WORD: u8 = 0x63;
const LOAD_CONSTANT: u8 = 0x18;
const MOVE: u8 = 0xbf;
const SET: u8 = 0xb7;
const XOR_WORD: u8 = 0xa4;
const JUMP_IF_SAME_WORD: u8 = 0x1e;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const PSEUDO_MAP_FD: u8 = 1;
const TAIL_CALL: i32 = 12;
/// The next program's affair (TCX_NEXT, TC_ACT_UNSPEC).
const NEXT: i32 = -1;

const fn op(code: u8, to: u8, from: u8, offset: i16, constant: i32) -> Instruction {
    Instruction::new(code, to, from, offset, constant)
}

/// The word for this packet: each device has its own, since what one writes may be there yet at the next.
fn word_of_packet(word: i32) -> [Instruction; 3] {
    [op(MOVE, KEPT, CONTEXT, 0, 0), op(LOAD_WORD, SECOND, CONTEXT, IFINDEX, 0), op(XOR_WORD, SECOND, 0, 0, word)]
}

/// Goes on in the program; nothing else happens if there is none.
fn go_on(array: BorrowedFd<'_>) -> [Instruction; 5] {
    [
        op(MOVE, CONTEXT, KEPT, 0, 0),
        op(LOAD_CONSTANT, SECOND, PSEUDO_MAP_FD, 0, array.as_raw_fd()),
        op(0, 0, 0, 0, 0),
        op(SET, THIRD, 0, 0, 0),
        op(CALL, 0, 0, 0, TAIL_CALL),
    ]
}

fn pass() -> [Instruction; 2] {
    [op(SET, RESULT, 0, 0, NEXT), op(EXIT, 0, 0, 0, 0)]
}

fn first(word: i32, array: BorrowedFd<'_>) -> Vec<Instruction> {
    let note = op(STORE_WORD, KEPT, SECOND, LAST_OF_CB, 0);
    word_of_packet(word).into_iter().chain([note]).chain(go_on(array)).chain(pass()).collect()
}

fn second(word: i32, array: BorrowedFd<'_>) -> Vec<Instruction> {
    let look = op(LOAD_WORD, THIRD, KEPT, LAST_OF_CB, 0);
    let go_on = go_on(array);
    let skip = op(JUMP_IF_SAME_WORD, SECOND, THIRD, go_on.len() as i16, 0);
    word_of_packet(word).into_iter().chain([look, skip]).chain(go_on).chain(pass()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a gate does with a packet of a device: whether it goes on in the program. A walk over the few operations there are.
    fn goes_on(gate: &[Instruction], ifindex: u32, control: &mut u32) -> bool {
        let mut registers = [0u32; 11];
        let mut at = 0;
        loop {
            let Instruction { code, offset, constant, .. } = gate[at];
            let (to, from) = (usize::from(gate[at].to()), usize::from(gate[at].from()));
            at += 1;
            match code {
                LOAD_WORD if offset == IFINDEX => registers[to] = ifindex,
                LOAD_WORD => registers[to] = *control,
                STORE_WORD => *control = registers[from],
                XOR_WORD => registers[to] ^= constant as u32,
                JUMP_IF_SAME_WORD if registers[to] == registers[from] => at += offset as usize,
                CALL => return true,
                EXIT => {
                    assert_eq!(registers[0], NEXT as u32);
                    return false;
                }
                SET => registers[to] = constant as u32,
                _ => {}
            }
        }
    }

    #[test]
    fn a_packet_goes_on_at_one_gate_and_only_there() {
        let array = std::fs::File::open("/dev/null").unwrap();
        let (first, second) = (first(0x1234, array.as_fd()), second(0x1234, array.as_fd()));
        let mut control = 7;
        assert!(goes_on(&first, 4, &mut control));
        assert!(!goes_on(&second, 4, &mut control), "it has been at the first");
        assert!(goes_on(&second, 5, &mut control), "at another device it has not");
        assert!(goes_on(&second, 4, &mut 7), "there was no first");
    }
}
