//! `shunt explain`: what would become of a connection, told hook by hook, without a packet being sent.

mod frame;
mod walk;
mod words;

pub(super) use words::end_text;

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};
use proxy_common::addr::{Addr, Port, Proto};
use proxy_common::lb::flow::Seconds;
use proxy_common::lb::socket::{self, Dial, Verdict};
use proxy_common::lb::tuple::Tuple;
use proxy_common::tables::Tables as _;
use serde::Serialize;

use super::table::{Format, print_json};
use super::{PinArgs, print};
use crate::datapath::device::Device;
use crate::datapath::dry_run::{DryRun, Hook};
use crate::datapath::inspect;
use crate::datapath::lookup::Lookup;
use crate::datapath::network::Watcher;
use crate::datapath::route::{Query, Route, Routes};
use crate::datapath::sys;
use frame::Kind;
use walk::{Fate, Step, Walker, packet_text};

/// What is explained.
#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    /// Who dials: an address of a pod, of this node, or of somebody outside; with or without a port
    #[arg(value_name = "SRC[:PORT]", value_parser = parse_end)]
    src: End,
    /// What is dialled; without a port: a ping
    #[arg(value_name = "DST[:PORT]", value_parser = parse_end)]
    dst: End,
    /// Of TCP the opening segment is explained, of UDP a datagram
    #[arg(value_enum, default_value_t)]
    protocol: Protocol,
    /// The device by which the packet comes (default: the one by which SRC is reached)
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Who asks: `process` begins at the socket hooks, `packet` leaves them out, as for a process that they do not serve
    #[arg(long, value_enum, default_value_t)]
    by: By,
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    pins: PinArgs,
}

/// One end of a connection as it is typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct End {
    addr: IpAddr,
    port: Option<u16>,
}

/// TCP or UDP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Protocol {
    #[default]
    Tcp,
    Udp,
}

/// Where an explanation begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum By {
    /// As a process, if SRC is this node or one of its pods
    #[default]
    Auto,
    /// As a process
    Process,
    /// As a packet
    Packet,
}

fn parse_end(text: &str) -> Result<End, String> {
    if let Ok(addr) = text.trim_start_matches('[').trim_end_matches(']').parse() {
        return Ok(End { addr, port: None });
    }
    let end: SocketAddr = text
        .parse()
        .map_err(|_| "not an address, nor an address with a port as in 10.96.0.1:80 or [fd00::1]:80".to_owned())?;
    Ok(End { addr: end.ip(), port: Some(end.port()) })
}

/// The whole answer.
#[derive(Serialize)]
struct Explanation {
    /// What was asked.
    question: String,
    /// The way there.
    forward: Vec<Step>,
    /// The way back; empty if there is none.
    reply: Vec<Step>,
    /// In short.
    result: String,
}

/// Prints the explanation.
pub(super) fn run(args: &ExplainArgs) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let explanation = runtime.block_on(explain(args))?;
    match args.output {
        Format::Json => print_json(&explanation),
        Format::Table => print(&explanation.to_string()),
    }
}

/// Source ports that are tried: one without a connection of its own.
const SOURCE_PORTS: std::ops::Range<u16> = 40000..41000;

async fn explain(args: &ExplainArgs) -> Result<Explanation> {
    if args.src.addr.is_ipv4() != args.dst.addr.is_ipv4() {
        bail!("{} and {} are of different families", args.src.addr, args.dst.addr);
    }
    let pins = args.pins.pins();
    let maps = super::show::open_maps(&pins)?;
    let lookup = Lookup::open(&maps)?;
    check_namespace(&lookup)?;
    let (_watcher, network) = Watcher::open().await?;
    let network = network.borrow().clone();
    let routes = Routes::open()?;
    let indices = |attached: Vec<inspect::Attached>| attached.into_iter().map(|device| device.ifindex).collect();
    let attached: BTreeSet<u32> = indices(inspect::attached(&pins)?);
    let with_xdp: BTreeSet<u32> = indices(inspect::attached_xdp(&pins)?);
    let mut hooks = vec![Hook::Ingress, Hook::IngressPort, Hook::Egress];
    if !with_xdp.is_empty() {
        hooks.push(Hook::Uplink);
    }
    let dry_run = DryRun::load(&pins, &hooks)?;
    let walker = Walker {
        dry_run: &dry_run,
        lookup: &lookup,
        network: &network,
        routes: &routes,
        attached,
        with_xdp,
        steps: vec![],
    };
    Course { args, walker }.run().await
}

/// Routes, sockets and devices are asked for in the namespace of this process: it must be the one that the agent serves.
fn check_namespace(lookup: &Lookup) -> Result<()> {
    let own = sys::netns_cookie().context("cannot read the network namespace's cookie")?;
    let served = lookup.config().map_or(0, |config| config.node_netns);
    if own != served {
        bail!("the agent serves another network namespace; run this there (nsenter --net=...)");
    }
    Ok(())
}

/// Who dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// A process in the node's own namespace.
    Node,
    /// Somebody behind a device.
    Behind(u32),
}

/// One explanation in the making.
struct Course<'a> {
    args: &'a ExplainArgs,
    walker: Walker<'a>,
}

impl Course<'_> {
    async fn run(mut self) -> Result<Explanation> {
        let origin = self.origin().await?;
        let (src, mut dst) = self.ends()?;
        let kind = self.kind();
        let question = match kind {
            Kind::Echo => format!("{} pings {}", src.ip(), dst.ip()),
            _ => format!("{src} dials {dst}, {}", if kind == Kind::Datagram { "UDP" } else { "TCP" }),
        };
        if kind != Kind::Echo && self.begins_at_socket(origin) {
            match self.dial(src, dst, origin) {
                Verdict::Translate(entry) => {
                    dst = SocketAddr::new(entry.backend.into(), entry.backend_port.host().0);
                }
                Verdict::Reject(_) => return Ok(self.finish(question, vec![], "refused at the socket".to_owned())),
                Verdict::Leave => {}
            }
        }
        let fate = self.send(kind, src, dst, origin).await?;
        let forward = std::mem::take(&mut self.walker.steps);
        let result = match &fate {
            Fate::Ended(why) => return Ok(Explanation { question, forward, reply: vec![], result: why.clone() }),
            Fate::Arrived { device: None, seen, .. } => {
                format!("reaches this node as {}", packet_text(seen))
            }
            Fate::Arrived { device: Some(device), seen, .. } => {
                format!("leaves by {} as {}", self.walker.device(*device)?.name, packet_text(seen))
            }
        };
        if kind != Kind::Echo {
            self.answer(kind, &fate, origin).await?;
        }
        Ok(self.finish(question, forward, result))
    }

    /// What was walked since is the way back, or, if nothing was before, the way there.
    fn finish(self, question: String, forward: Vec<Step>, result: String) -> Explanation {
        let steps = self.walker.steps;
        let (forward, reply) = if forward.is_empty() { (steps, vec![]) } else { (forward, steps) };
        Explanation { question, forward, reply, result }
    }

    fn kind(&self) -> Kind {
        match (self.args.dst.port, self.args.protocol) {
            (None, _) => Kind::Echo,
            (_, Protocol::Tcp) => Kind::TcpOpening,
            (_, Protocol::Udp) => Kind::Datagram,
        }
    }

    fn proto(&self) -> Proto {
        if self.args.protocol == Protocol::Udp { Proto::UDP } else { Proto::TCP }
    }

    /// Both ends. A source port that is not given is one without a connection.
    fn ends(&self) -> Result<(SocketAddr, SocketAddr)> {
        let (src, dst) = (self.args.src, self.args.dst);
        let dst = SocketAddr::new(dst.addr, dst.port.unwrap_or(0));
        if let Some(port) = src.port {
            return Ok((SocketAddr::new(src.addr, port), dst));
        }
        for port in SOURCE_PORTS {
            let src = SocketAddr::new(src.addr, port);
            if !self.walker.dry_run.has_flow(&tuple(src, dst, self.proto()).front_key())? {
                return Ok((src, dst));
            }
        }
        bail!("all source ports of {} that were tried have connections; name one", src.addr)
    }

    async fn origin(&mut self) -> Result<Origin> {
        let network = self.walker.network;
        if let Some(name) = &self.args.device {
            let device = network.devices.values().find(|device| device.name == *name);
            return Ok(Origin::Behind(device.with_context(|| format!("there is no device {name}"))?.index));
        }
        let src = self.args.src.addr;
        if src.is_loopback() || network.bindings.iter().any(|binding| binding.addr == src) {
            return Ok(Origin::Node);
        }
        match self.walker.routes.route(&Query { dst: src, src: None, by: None }).await {
            Route::Out(device) if self.walker.device(device)?.kind == "bridge" => {
                Ok(Origin::Behind(self.port_towards(device, src).await?))
            }
            Route::Out(device) => Ok(Origin::Behind(device)),
            Route::Local => Ok(Origin::Node),
            Route::None(why) => {
                bail!("there is no route to {src} ({why}): name the device its packets come by, --device")
            }
        }
    }

    /// The port of a bridge behind which an address is, as far as the kernel knows; else any of them, which is told.
    async fn port_towards(&mut self, bridge: u32, addr: IpAddr) -> Result<u32> {
        if let Some(mac) = self.walker.routes.neighbour(bridge, addr).await?
            && let Some(port) = self.walker.routes.bridge_port(bridge, mac).await?
        {
            return Ok(port);
        }
        let name = self.walker.device(bridge)?.name.clone();
        let is_port = |device: &&Device| device.controller.as_ref().is_some_and(|master| master.index == bridge);
        let port = self.walker.network.devices.values().find(is_port);
        let port = port.with_context(|| format!("{name} has no port behind which {addr} could be"))?;
        let taken =
            format!("does not know behind which port {addr} is; {} is taken (--device names another)", port.name);
        self.walker.step(&name, &taken);
        Ok(port.index)
    }

    fn begins_at_socket(&self, origin: Origin) -> bool {
        let is_own_pod =
            |config: &proxy_common::abi::config::Config| config.is_own_pod_address(&Addr::from(self.args.src.addr));
        match self.args.by {
            By::Process => true,
            By::Packet => false,
            By::Auto => origin == Origin::Node || self.walker.lookup.config().is_some_and(is_own_pod),
        }
    }

    /// What the socket hooks do with a process that dials.
    fn dial(&mut self, src: SocketAddr, dst: SocketAddr, origin: Origin) -> Verdict {
        let of_node = origin == Origin::Node;
        let lookup = self.walker.lookup;
        let node = lookup.config().map_or(0, |config| config.node_netns);
        let dial = Dial {
            addr: Addr::from(dst.ip()),
            port: Port(dst.port()).be(),
            proto: self.proto(),
            socket: u64::from(src.port()),
            // Any other than the node's.
            netns: if of_node { node } else { !node },
            bound: self.args.src.port.is_some(),
            now: Seconds::from_nanos(sys::monotonic().as_nanos() as u64),
        };
        let verdict = socket::dial(lookup, &dial);
        let (what, why) = words::socket_text(lookup, &tuple(src, dst, self.proto()), of_node, &verdict);
        let call = if self.proto() == Proto::TCP { "connect" } else { "connect or sendto" };
        self.walker.steps.push(Step { at: format!("socket {call}"), what, why, packet: None });
        verdict
    }

    /// The first packet goes out.
    async fn send(&mut self, kind: Kind, src: SocketAddr, dst: SocketAddr, origin: Origin) -> Result<Fate> {
        let frame = |link| frame::build(kind, link, src, dst).context("a packet cannot be made of these ends");
        match origin {
            Origin::Behind(device) => {
                let frame = frame(self.walker.link_in(device)?)?;
                self.walker.enter(frame, device).await
            }
            Origin::Node => {
                let frame = frame(frame::Link { src: [0; 6], dst: [0; 6] })?;
                let seen = frame::parse(&frame).context("a packet that was just made")?;
                self.walker.forward(frame, seen, None).await
            }
        }
    }

    /// The backend's answer comes back.
    async fn answer(&mut self, kind: Kind, fate: &Fate, origin: Origin) -> Result<()> {
        let Fate::Arrived { device, seen, switched } = fate else { return Ok(()) };
        let kind = if kind == Kind::TcpOpening { Kind::TcpAnswer } else { kind };
        match *device {
            Some(by) => {
                let mut link = self.walker.link_in(by)?;
                if *switched && let Origin::Behind(_) = origin {
                    // The backend answers its neighbour, not the node.
                    let client = self.args.src.addr;
                    let bridge = self.walker.device(by)?.controller.as_ref().map_or(0, |controller| controller.index);
                    link.dst = self.walker.routes.neighbour(bridge, client).await?.unwrap_or(link.dst);
                }
                let frame = frame::build(kind, link, seen.dst, seen.src).context("an answer cannot be made")?;
                self.walker.enter(frame, by).await?;
            }
            None => {
                let link = frame::Link { src: [0; 6], dst: [0; 6] };
                let frame = frame::build(kind, link, seen.dst, seen.src).context("an answer cannot be made")?;
                let seen = frame::parse(&frame).context("a packet that was just made")?;
                self.walker.forward(frame, seen, None).await?;
            }
        }
        Ok(())
    }
}

fn tuple(src: SocketAddr, dst: SocketAddr, proto: Proto) -> Tuple {
    let (sport, dport) = (Port(src.port()).be(), Port(dst.port()).be());
    Tuple { src: Addr::from(src.ip()), dst: Addr::from(dst.ip()), sport, dport, proto }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.question)?;
        let steps = || self.forward.iter().chain(&self.reply);
        let width = steps().map(|step| step.at.chars().count()).max().unwrap_or(0);
        for (title, steps) in [(None, &self.forward), (Some("the answer"), &self.reply)] {
            if steps.is_empty() {
                continue;
            }
            if let Some(title) = title {
                writeln!(f, "\n{title}")?;
            }
            for step in steps {
                writeln!(f, "  {:<width$}  {}", step.at, step.what)?;
                for line in &step.why {
                    writeln!(f, "  {:<width$}    {line}", "")?;
                }
                if let Some(packet) = &step.packet {
                    writeln!(f, "  {:<width$}    {packet}", "")?;
                }
            }
        }
        writeln!(f, "\n{}", self.result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_read_with_and_without_a_port() {
        let end = |addr: &str, port| Ok(End { addr: addr.parse().expect("valid"), port });
        assert_eq!(parse_end("10.0.0.1"), end("10.0.0.1", None));
        assert_eq!(parse_end("10.0.0.1:80"), end("10.0.0.1", Some(80)));
        assert_eq!(parse_end("fd00::1"), end("fd00::1", None));
        assert_eq!(parse_end("[fd00::1]"), end("fd00::1", None));
        assert_eq!(parse_end("[fd00::1]:80"), end("fd00::1", Some(80)));
        for wrong in ["", "web", "10.0.0.1:", "10.0.0.1:99999", "10.0.0"] {
            assert!(parse_end(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn an_explanation_reads_from_top_to_bottom() {
        let step = |at: &str, what: &str| Step { at: at.to_owned(), what: what.to_owned(), why: vec![], packet: None };
        let why =
            Step { why: vec!["because".to_owned()], packet: Some("a > b".to_owned()), ..step("ingress", "changed") };
        let explanation = Explanation {
            question: "a dials b, TCP".to_owned(),
            forward: vec![why, step("route", "out")],
            reply: vec![step("egress", "back")],
            result: "leaves".to_owned(),
        };
        let text = "a dials b, TCP\n\n  ingress  changed\n             because\n             a > b\n  route    out\n\nthe answer\n  egress   back\n\nleaves\n";
        assert_eq!(explanation.to_string(), text);
    }
}
