//! A made packet on its way: through the hooks of the devices it meets, in the order in which it meets them, and where the
//! kernel would route it in between.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, anyhow};
use proxy_common::abi::flow::FlowKey;
use proxy_common::lb::tuple::Tuple;
use serde::Serialize;

use super::frame::{self, Content, Link, Mac, Seen};
use super::words;
use crate::datapath::device::{Attachment, Choice, Device, decide_attachment};
use crate::datapath::dry_run::{DryRun, Hook, Outcome};
use crate::datapath::lookup::Lookup;
use crate::datapath::network::Network;
use crate::datapath::route::{Query, Route, Routes};

/// One thing that happens to a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// The hook or the part of the kernel.
    pub at: String,
    /// What happens there.
    pub what: String,
    /// Why, line by line.
    pub why: Vec<String>,
    /// The packet afterwards, if it changed.
    pub packet: Option<String>,
}

/// What became of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It left by a device, or reached this node itself (`None`), like this.
    Arrived {
        /// Interface index.
        device: Option<u32>,
        /// The packet as it is then.
        seen: Seen,
        /// It was switched by a bridge, past the node.
        switched: bool,
    },
    /// It goes no further.
    Ended(String),
}

/// What a walk looks at.
pub struct Walker<'a> {
    pub dry_run: &'a DryRun,
    pub lookup: &'a Lookup,
    pub network: &'a Network,
    pub routes: &'a Routes,
    /// Devices that have the packet programs.
    pub attached: BTreeSet<u32>,
    /// Devices that run the XDP program.
    pub with_xdp: BTreeSet<u32>,
    /// What happened so far.
    pub steps: Vec<Step>,
}

/// A locally administered address for whoever is on the other side of a link.
const NEIGHBOUR: Mac = [2, 0, 0, 0, 0, 1];

impl Walker<'_> {
    /// The device with an index.
    pub fn device(&self, index: u32) -> Result<&Device> {
        self.network.devices.get(&index).ok_or_else(|| anyhow!("the device with index {index} is gone"))
    }

    /// The ends of a frame that comes in by a device, for this node.
    pub fn link_in(&self, index: u32) -> Result<Link> {
        let device = self.device(index)?;
        let bridge = bridge_of(device).and_then(|bridge| self.network.devices.get(&bridge));
        Ok(Link { src: NEIGHBOUR, dst: bridge.unwrap_or(device).mac })
    }

    /// A frame comes in by a device.
    pub async fn enter(&mut self, frame: Vec<u8>, by: u32) -> Result<Fate> {
        let mut frame = frame;
        let mut by = by;
        if self.with_xdp.contains(&by) {
            match self.pass(Hook::Uplink, by, frame)? {
                Ok(next) => frame = next,
                Err(end) => return Ok(end),
            }
        }
        let bridge = bridge_of(self.device(by)?);
        let hook = if bridge.is_some() { Hook::IngressPort } else { Hook::Ingress };
        match self.pass(hook, by, frame)? {
            Ok(next) => frame = next,
            Err(end) => return Ok(end),
        }
        if let Some(bridge) = bridge {
            let seen = read(&frame)?;
            if seen.mac != self.device(bridge)?.mac {
                return self.switch(frame, seen, bridge).await;
            }
            match self.pass(Hook::Ingress, bridge, frame)? {
                Ok(next) => frame = next,
                Err(end) => return Ok(end),
            }
            by = bridge;
        }
        let seen = read(&frame)?;
        self.forward(frame, seen, Some(by)).await
    }

    /// A packet of this node itself is sent, or one from elsewhere forwarded: the kernel looks for a route.
    pub async fn forward(&mut self, frame: Vec<u8>, seen: Seen, by: Option<u32>) -> Result<Fate> {
        let query = Query { dst: seen.dst.ip(), src: by.map(|_| seen.src.ip()), by };
        match self.routes.route(&query).await {
            Route::Local => {
                self.step("route", "to this node itself");
                Ok(Fate::Arrived { device: None, seen, switched: false })
            }
            Route::None(why) => {
                self.step("route", &format!("none: {why}"));
                Ok(Fate::Ended(format!("no route to {}", seen.dst.ip())))
            }
            Route::Out(out) => {
                let name = self.device(out)?.name.clone();
                self.step("route", &format!("out by {name}"));
                let frame = match self.pass(Hook::Egress, out, frame)? {
                    Ok(next) => next,
                    Err(end) => return Ok(end),
                };
                let seen = read(&frame)?;
                if self.device(out)?.kind != "bridge" {
                    return Ok(Fate::Arrived { device: Some(out), seen, switched: false });
                }
                let Some(port) = self.port_of(out, &seen).await? else {
                    self.step("bridge", &format!("{name} does not know where {} is: it asks", seen.dst.ip()));
                    return Ok(Fate::Arrived { device: Some(out), seen, switched: false });
                };
                self.leave_port(frame, port, false)
            }
        }
    }

    /// The port of a bridge behind which a packet's receiver is.
    async fn port_of(&self, bridge: u32, seen: &Seen) -> Result<Option<u32>> {
        match self.routes.neighbour(bridge, seen.dst.ip()).await? {
            Some(mac) => Ok(self.routes.bridge_port(bridge, mac).await?),
            None => Ok(None),
        }
    }

    /// A bridge sends a frame on that is not for itself.
    async fn switch(&mut self, frame: Vec<u8>, seen: Seen, bridge: u32) -> Result<Fate> {
        let name = self.device(bridge)?.name.clone();
        match self.routes.bridge_port(bridge, seen.mac).await? {
            Some(port) => {
                let device = self.device(port)?.name.clone();
                self.step("bridge", &format!("{name} switches it to {device}, past the node's IP stack"));
                self.leave_port(frame, port, true)
            }
            None => {
                self.step("bridge", &format!("{name} does not know where it goes, and floods it"));
                Ok(Fate::Arrived { device: Some(bridge), seen, switched: true })
            }
        }
    }

    fn leave_port(&mut self, frame: Vec<u8>, port: u32, switched: bool) -> Result<Fate> {
        match self.pass(Hook::Egress, port, frame)? {
            Ok(next) => Ok(Fate::Arrived { device: Some(port), seen: read(&next)?, switched }),
            Err(end) => Ok(end),
        }
    }

    /// A frame meets a hook: what comes out, or how it ends.
    fn pass(&mut self, hook: Hook, index: u32, frame: Vec<u8>) -> Result<Result<Vec<u8>, Fate>> {
        let name = self.device(index)?.name.clone();
        let at = match hook {
            Hook::Uplink => format!("XDP {name}"),
            Hook::Ingress | Hook::IngressPort => format!("ingress {name}"),
            Hook::Egress => format!("egress {name}"),
        };
        if hook != Hook::Uplink && !self.attached.contains(&index) {
            self.step(&at, "no program is attached here: what comes by this device is not served");
            return Ok(Ok(frame));
        }
        let before = read(&frame)?;
        let front = before.tuple().front_key();
        let is_known = self.dry_run.has_flow(&front)?;
        match self.dry_run.run(hook, index, &frame)? {
            Outcome::Next(after) => {
                self.tell_change(at, hook, &before, &read(&after)?, is_known.then_some(front))?;
                Ok(Ok(after))
            }
            Outcome::Dropped(reason) => {
                let reason = reason.map_or(("unknown", "the program gives no reason"), |reason| {
                    (reason.name(), words::reason_text(reason))
                });
                let mut why = self.dialled(&before);
                why.insert(0, reason.1.to_owned());
                self.steps.push(Step { at, what: format!("dropped ({})", reason.0), why, packet: None });
                Ok(Err(Fate::Ended(format!("dropped: {}", reason.1))))
            }
            Outcome::Answered(reason, answer) => {
                let kind = match frame::parse(&answer).map(|seen| seen.content) {
                    Some(Content::Tcp { .. }) => "a TCP reset",
                    _ => "ICMP port unreachable",
                };
                let reason = reason.map_or(("unknown", "the program gives no reason"), |reason| {
                    (reason.name(), words::reason_text(reason))
                });
                let mut why = self.dialled(&before);
                why.insert(0, reason.1.to_owned());
                let what = format!("answered with {kind} ({}): the client sees \"connection refused\"", reason.0);
                self.steps.push(Step { at, what, why, packet: None });
                Ok(Err(Fate::Ended(format!("refused: {}", reason.1))))
            }
        }
    }

    /// Service and set that a refused packet was for.
    fn dialled(&self, seen: &Seen) -> Vec<String> {
        let tuple = seen.tuple();
        let Some(frontend) = words::frontend(self.lookup, &tuple, false) else { return vec![] };
        let inside = words::is_client_inside(self.lookup, &tuple);
        vec![
            format!("service {}", words::frontend_text(self.lookup, &frontend)),
            words::set_text(self.lookup, &frontend, inside),
        ]
    }

    fn tell_change(
        &mut self,
        at: String,
        hook: Hook,
        before: &Seen,
        after: &Seen,
        known: Option<FlowKey>,
    ) -> Result<()> {
        let changes = changes(before, after);
        if changes.is_empty() {
            self.step(&at, "passes as it is");
            return Ok(());
        }
        let tuple: Tuple = before.tuple();
        let why = match (hook, self.dry_run.flow(&tuple.front_key())?) {
            (Hook::Egress, _) if before.dst != after.dst => vec![],
            (Hook::Egress, _) => self.egress_reason(&tuple, before, after)?,
            (_, Some(flow)) => words::flow_text(self.lookup, &tuple, &flow, known.is_some()),
            (_, None) => vec!["an answer to a source that this node rewrote: it is the client's again".to_owned()],
        };
        let packet = Some(packet_text(after));
        self.steps.push(Step { at, what: changes.join(", "), why, packet });
        Ok(())
    }

    /// Why a source changed.
    fn egress_reason(&self, tuple: &Tuple, before: &Seen, after: &Seen) -> Result<Vec<String>> {
        let (key, src_is_a) = tuple.plain_key();
        let Some(flow) = self.dry_run.flow(&key)? else { return Ok(vec![]) };
        use proxy_common::abi::flow::FlowValue;
        let from_client = flow.has(FlowValue::CLIENT_IS_A) == src_is_a;
        Ok(vec![match from_client {
            true => format!("the backend shall answer to this node, not to {}", before.src.ip()),
            false => format!("the client knows the backend as {}", after.src),
        }])
    }

    /// Notes something that needs no reason.
    pub fn step(&mut self, at: &str, what: &str) {
        self.steps.push(Step { at: at.to_owned(), what: what.to_owned(), why: vec![], packet: None });
    }
}

/// The bridge that a device is a port of.
fn bridge_of(device: &Device) -> Option<u32> {
    match decide_attachment(device, &Choice::default()) {
        Ok(Attachment::BridgePort(bridge)) => Some(bridge),
        _ => None,
    }
}

fn read(frame: &[u8]) -> Result<Seen> {
    frame::parse(frame).context("a program made a packet that cannot be read")
}

/// `10.0.0.1:1000 > 10.0.0.2:80`.
pub fn packet_text(seen: &Seen) -> String {
    match seen.content {
        Content::Icmp => format!("{} > {}", seen.src.ip(), seen.dst.ip()),
        _ => format!("{} > {}", seen.src, seen.dst),
    }
}

/// What a program changed.
fn changes(before: &Seen, after: &Seen) -> Vec<String> {
    let mut changes = vec![];
    if before.dst != after.dst {
        changes.push(format!("destination becomes {}", after.dst));
    }
    if before.src != after.src {
        changes.push(format!("source becomes {}", after.src));
    }
    if before.mac != after.mac {
        let mac: Vec<_> = after.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        changes.push(format!("goes straight to {} on the same bridge", mac.join(":")));
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(src: &str, dst: &str) -> Seen {
        let end = |text: &str| text.parse().expect("valid");
        Seen { mac: [0; 6], src: end(src), dst: end(dst), content: Content::Udp }
    }

    #[test]
    fn changes_are_told_one_by_one() {
        let before = seen("10.0.0.1:1", "10.0.0.2:2");
        assert!(changes(&before, &before).is_empty());
        let after = Seen { mac: [1; 6], ..seen("10.0.0.3:3", "10.0.0.4:4") };
        let told = changes(&before, &after);
        assert_eq!(told[0], "destination becomes 10.0.0.4:4");
        assert_eq!(told[1], "source becomes 10.0.0.3:3");
        assert_eq!(told[2], "goes straight to 01:01:01:01:01:01 on the same bridge");
    }
}
