//! The programs in which others go on: one list for those who jump and for the agent, which fills the map of them.

/// A program that is tail-called, by its position in the map.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Continuation {
    /// Reads all of a packet that matters.
    Read = 0,
    /// Looks for its flow.
    Flow,
    /// Decides where a flow goes that it opens.
    Open,
    /// Stores that flow.
    Create,
    /// Refuses it with an answer.
    Answer,
    /// Decides on one that leaves.
    Rest,
}

impl Continuation {
    /// All of them, by position.
    pub const ALL: [Self; 6] = [Self::Read, Self::Flow, Self::Open, Self::Create, Self::Answer, Self::Rest];

    /// The program's name in the object.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Flow => "flow",
            Self::Open => "open",
            Self::Create => "create",
            Self::Answer => "answer",
            Self::Rest => "rest",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_those_of_the_list() {
        for (position, continuation) in Continuation::ALL.into_iter().enumerate() {
            assert_eq!(continuation as usize, position);
        }
    }
}
