//! One writer, many readers of the newest snapshot.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::content::Content;
use super::node::NodeFacts;
use super::snapshot::Snapshot;
use super::trigger::Triggers;
use super::update::{SourceSpec, Update};

/// The one place where desired state changes.
#[derive(Debug)]
pub struct Writer {
    content: Content,
    newest: watch::Sender<Arc<Snapshot>>,
}

/// Sees the newest snapshot; the ones between are skipped, never queued.
pub type Reader = watch::Receiver<Arc<Snapshot>>;

/// How many waiting updates become one snapshot.
const BATCH: usize = 1024;

impl Writer {
    /// A store without objects, and a reader of it (clone it for more).
    pub fn new(facts: Arc<NodeFacts>, sources: &[SourceSpec]) -> (Self, Reader) {
        let content = Content::new(facts, sources);
        let (newest, reader) = watch::channel(Arc::new(content.snapshot().clone()));
        (Self { content, newest }, reader)
    }

    /// Takes updates in their order; readers see their common result, if it changed anything.
    pub fn apply(&mut self, updates: impl IntoIterator<Item = Update>) {
        let mut changed = false;
        for update in updates {
            changed |= self.content.apply(update);
        }
        self.publish_if(changed);
    }

    /// When the changes happened that nobody has taken yet.
    pub fn triggers(&self) -> Triggers {
        self.content.triggers().clone()
    }

    /// Replaces what is known about this node.
    pub fn set_facts(&mut self, facts: Arc<NodeFacts>) {
        let changed = self.content.set_facts(facts);
        self.publish_if(changed);
    }

    /// Takes updates and facts as they come, until every sender of updates is gone. What waits is taken together.
    pub async fn run(mut self, mut updates: mpsc::Receiver<Update>, mut facts: watch::Receiver<Arc<NodeFacts>>) {
        let mut batch = Vec::with_capacity(BATCH);
        let mut facts_live = true;
        loop {
            tokio::select! {
                count = updates.recv_many(&mut batch, BATCH) => match count {
                    0 => return,
                    _ => self.apply(batch.drain(..)),
                },
                changed = facts.changed(), if facts_live => match changed {
                    Ok(()) => {
                        let newest = facts.borrow_and_update().clone();
                        self.set_facts(newest);
                    }
                    Err(_) => facts_live = false,
                },
            }
        }
    }

    fn publish_if(&self, changed: bool) {
        if changed {
            self.newest.send_replace(Arc::new(self.content.snapshot().clone()));
        }
    }
}
