//! What is told, and the way from the parts to who writes it down. May touch: nothing.

use std::fmt;

use prometheus_client::metrics::counter::Counter;
use tokio::sync::mpsc;

use crate::model::ObjectKey;

/// Notices that may wait to be looked at.
const QUEUE: usize = 256;

/// Whom a notice is about.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Regarding {
    /// This node.
    Node,
    /// An object of the Kubernetes API.
    Object(ObjectKey),
}

/// Who else may tell the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Scope {
    /// Every node sees it alike: one event is enough.
    Cluster,
    /// It is so on this node.
    Node,
}

/// Something to tell as an event. Two that are equal are one event that is counted.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Notice {
    /// Whom it is about.
    pub regarding: Regarding,
    /// Whether somebody should do something about it.
    pub is_warning: bool,
    /// Who else may tell it.
    pub scope: Scope,
    /// Why, as programs read it; CamelCase.
    pub reason: &'static str,
    /// What was being done; CamelCase.
    pub action: &'static str,
    /// For people.
    pub note: String,
}

impl Notice {
    /// A warning about this node.
    pub fn of_node(reason: &'static str, action: &'static str, note: impl Into<String>) -> Self {
        let (regarding, scope) = (Regarding::Node, Scope::Node);
        Self { regarding, is_warning: true, scope, reason, action, note: note.into() }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.regarding {
            Regarding::Node => write!(f, "{} about this node: {}", self.reason, self.note),
            Regarding::Object(key) => write!(f, "{} about {key}: {}", self.reason, self.note),
        }
    }
}

/// Where parts tell. Never waits. The default leads nowhere.
#[derive(Clone, Debug, Default)]
pub struct Notices(Option<(mpsc::Sender<Notice>, Counter)>);

/// A way for notices; those that find no room are counted by `lost`.
pub fn channel(lost: Counter) -> (Notices, mpsc::Receiver<Notice>) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    (Notices(Some((sender, lost))), receiver)
}

impl Notices {
    /// Tells it, if there is room.
    pub fn tell(&self, notice: Notice) {
        if let Some((sender, lost)) = &self.0
            && sender.try_send(notice).is_err()
        {
            lost.inc();
        }
    }
}

/// What a part tells when something that it needs is not to be had.
#[derive(Clone, Debug, Default)]
pub struct Alarm {
    /// Where.
    pub notices: Notices,
    /// Why, as programs read it.
    pub reason: &'static str,
    /// What was being done.
    pub action: &'static str,
}

impl Alarm {
    /// Tells of this node what is wrong.
    pub fn ring(&self, note: String) {
        self.notices.tell(Notice::of_node(self.reason, self.action, note));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_finds_no_room_is_counted_and_nobody_waits() {
        let lost = Counter::default();
        let (notices, _receiver) = channel(lost.clone());
        (0..QUEUE + 3).for_each(|number| notices.tell(Notice::of_node("A", "B", number.to_string())));
        assert_eq!(lost.get(), 3);
        Notices::default().tell(Notice::of_node("A", "B", ""));
    }
}
