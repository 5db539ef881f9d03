//! The wish that the agent ends, as every long-lived part sees it.

use tokio::sync::watch;

/// Tells a part that it shall end. Clones tell the same.
#[derive(Clone, Debug)]
pub struct Drain(watch::Receiver<bool>);

/// Begins the drain; so does dropping it.
#[derive(Debug)]
pub struct Trigger(watch::Sender<bool>);

/// A drain that has not begun.
pub fn channel() -> (Trigger, Drain) {
    let (sender, receiver) = watch::channel(false);
    (Trigger(sender), Drain(receiver))
}

impl Trigger {
    /// Tells all parts to end.
    pub fn begin(&self) {
        self.0.send_replace(true);
    }
}

impl Drain {
    /// Returns when the drain begins.
    pub async fn wait(&mut self) {
        // An error means that the trigger is gone: the agent ends too.
        let _ = self.0.wait_for(|begun| *begun).await;
    }

    /// True once it has begun.
    pub fn has_begun(&self) -> bool {
        *self.0.borrow()
    }
}
