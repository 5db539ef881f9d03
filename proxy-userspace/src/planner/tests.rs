//! Properties of planning, over random sequences of changes: a rebuild equals the sum of the steps, no step takes a working
//! frontend away, nothing is used twice, and a restart in the middle of anything loses nothing.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::{NonZeroU32, NonZeroU64};
use std::sync::Arc;

use ipnet::IpNet;
use proptest::prelude::*;
use proxy_common::abi::address::{AddressClass, PortUse, port_index};
use proxy_common::abi::frontend::FrontendValue;
use proxy_common::abi::service::Range;
use proxy_common::addr::{Addr, Port};

use super::*;
use crate::model::content::Content;
use crate::model::*;

const LIMITS: Limits = Limits { services: 256, backends: 256, slots: 1024 };
const NODE: &str = "node-a";
const SOURCES: [SourceSpec; 2] = [
    SourceSpec { id: SourceId::Kubernetes, kinds: &[Kind::Service] },
    SourceSpec { id: SourceId::Manifests, kinds: &[Kind::Service] },
];

fn snat() -> SnatPorts {
    SnatPorts(10000..=10040)
}

/// A change of the world. Everything is drawn from small pools, so that things collide.
#[derive(Clone, Debug)]
enum Step {
    Service {
        source: SourceId,
        name: u8,
        genes: u64,
    },
    DeleteService {
        source: SourceId,
        name: u8,
    },
    Slice {
        source: SourceId,
        slice: u8,
        service: u8,
        genes: Vec<u16>,
    },
    DeleteSlice {
        source: SourceId,
        slice: u8,
    },
    Node {
        genes: u8,
    },
    Facts {
        genes: u8,
    },
    /// The grace periods of this many plans pass.
    Grace(u8),
    /// The agent dies after this many operations of its next plan, and starts again.
    Crash(u8),
}

fn source() -> impl Strategy<Value = SourceId> {
    prop_oneof![Just(SourceId::Kubernetes), Just(SourceId::Manifests)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (source(), 0u8..4, any::<u64>()).prop_map(|(source, name, genes)| Step::Service { source, name, genes }),
        2 => (source(), 0u8..4).prop_map(|(source, name)| Step::DeleteService { source, name }),
        6 => (source(), 0u8..5, 0u8..4, prop::collection::vec(any::<u16>(), 0..5))
            .prop_map(|(source, slice, service, genes)| Step::Slice { source, slice, service, genes }),
        2 => (source(), 0u8..5).prop_map(|(source, slice)| Step::DeleteSlice { source, slice }),
        1 => any::<u8>().prop_map(|genes| Step::Node { genes }),
        1 => any::<u8>().prop_map(|genes| Step::Facts { genes }),
        2 => (0u8..4).prop_map(Step::Grace),
        1 => any::<u8>().prop_map(Step::Crash),
    ]
}

/// Takes a few bits off a number.
struct Genes(u64);

impl Genes {
    fn below(&mut self, bound: u64) -> u64 {
        let value = self.0 % bound;
        self.0 /= bound;
        value
    }

    fn flag(&mut self) -> bool {
        self.below(2) == 1
    }
}

fn v4(block: u8, last: u64) -> Addr {
    Addr::from(IpAddr::V4(Ipv4Addr::new(10, block, 0, last as u8 + 1)))
}

fn v6(block: u8, last: u64) -> Addr {
    Addr::from(IpAddr::V6(Ipv6Addr::new(0xfd00, block.into(), 0, 0, 0, 0, 0, last as u16 + 1)))
}

fn service(genes: u64) -> Service {
    let mut genes = Genes(genes);
    let local = |yes: bool| if yes { TrafficPolicy::Local } else { TrafficPolicy::Cluster };
    let port = |genes: &mut Genes, name: &str, protocol| ServicePort {
        name: Name::from(name),
        protocol,
        port: Port(80 + genes.below(2) as u16),
        node_port: genes.flag().then(|| Port(30000 + genes.below(3) as u16)),
    };
    let first = if genes.flag() { "http" } else { "web" };
    let mut ports = vec![port(&mut genes, first, Protocol::Tcp)];
    if genes.flag() {
        ports.push(port(&mut genes, "dns", Protocol::Udp));
    }
    Service {
        created: NonZeroU64::new(genes.below(3)),
        cluster_ips: ByFamily {
            v4: (genes.below(4) > 0).then(|| v4(96, genes.below(3))),
            v6: (genes.below(3) == 0).then(|| v6(96, genes.below(2))),
        },
        ports: ports.into(),
        // 10.244.0.1 is an endpoint too, 10.1.0.1 an address of the node.
        external_ips: match genes.below(5) {
            0 => Box::new([v4(1, 0)]),
            1 => Box::new([v4(203, genes.below(2)), v6(203, 0)]),
            2 => Box::new([v4(244, 0)]),
            _ => Box::default(),
        },
        load_balancer_ips: if genes.below(3) == 0 { Box::new([v4(203, genes.below(2))]) } else { Box::default() },
        internal_policy: local(genes.below(3) == 0),
        external_policy: local(genes.below(2) == 0),
        affinity: NonZeroU32::new(genes.below(2) as u32 * 60),
        health_check: (genes.below(3) == 0).then(|| Port(30002 + genes.below(2) as u16)),
        source_ranges: ByFamily { v4: source_ranges(genes.below(5)), v6: None },
        stale: None,
    }
}

/// The node's address is in the first of them.
fn source_ranges(gene: u64) -> Option<Box<[IpNet]>> {
    let nets: &[&str] = match gene {
        0 => &["10.1.0.0/24"],
        1 => &["10.1.0.0/24", "198.51.100.0/24"],
        2 => &[],
        _ => return None,
    };
    Some(nets.iter().map(|net| net.parse().expect("a prefix")).collect())
}

fn endpoint(genes: u16) -> Endpoint {
    let mut genes = Genes(genes.into());
    let addr = if genes.below(3) > 0 { v4(244, genes.below(6)) } else { v6(244, genes.below(3)) };
    let node = match genes.below(4) {
        0 => None,
        1 => Some(NODE),
        _ => Some("node-b"),
    };
    let hints = match genes.below(6) {
        0 => Hints { zones: Box::new([Name::from("zone-a")]), nodes: Box::default() },
        1 => Hints { zones: Box::new([Name::from("zone-b")]), nodes: Box::new([Name::from(NODE)]) },
        _ => Hints::default(),
    };
    let conditions = match genes.below(8) {
        0 => Conditions::new(Some(false), Some(true), Some(true)),
        1 => Conditions::new(Some(false), Some(false), Some(true)),
        2 => Conditions::new(Some(false), Some(false), None),
        3 => Conditions::new(Some(true), Some(false), None),
        _ => Conditions::new(None, None, None),
    };
    Endpoint { addr, node: node.map(Name::from), hints: Some(Arc::new(hints)), conditions }
}

fn slice(name: u8, genes: &[u16]) -> EndpointGroup {
    let port = |name: &str, protocol, port| EndpointPort { name: Name::from(name), protocol, port: Port(port) };
    let ports = [
        port("http", Protocol::Tcp, 8080),
        port("web", Protocol::Tcp, 8080),
        port("dns", Protocol::Udp, 80),
        port("dns", Protocol::Tcp, 53),
    ];
    let endpoints = genes.iter().map(|genes| endpoint(*genes)).collect();
    EndpointGroup {
        kind: GroupKind::Slice,
        name: Name::from(format!("slice-{name}").as_str()),
        subsets: Box::new([EndpointSubset { ports: Box::new(ports), endpoints }]),
    }
}

fn node(genes: u8) -> Node {
    let mut genes = Genes(genes.into());
    Node {
        zone: [None, Some("zone-a"), Some("zone-b")][genes.below(3) as usize].map(Name::from),
        pod_cidrs: if genes.flag() { Box::new(["10.244.0.0/24".parse().unwrap()]) } else { Box::default() },
        addresses: ByFamily { v4: genes.flag().then(|| v4(1, 0)), v6: None },
        is_leaving: genes.flag(),
    }
}

fn facts(genes: u8) -> NodeFacts {
    let mut genes = Genes(genes.into());
    // 10.1.0.1 is an external address of services, 10.96.0.1 a ClusterIP, 10.244.0.2 an endpoint.
    let pool = [v4(1, 0), v4(1, 1), v4(96, 0), v4(244, 1), v6(1, 0)];
    let local = |addr| LocalAddress { addr, device: Name::from("eth0") };
    let addresses = pool.into_iter().filter(|_| genes.flag()).map(local).collect();
    let node_ports = [NodePortAddresses::Primary, NodePortAddresses::All][genes.below(2) as usize].clone();
    NodeFacts { addresses, node_ports, ..NodeFacts::named(Name::from(NODE)) }
}

fn events(step: &Step) -> Option<Update> {
    let namespace = Name::from("default");
    let named = |kind: &str, number: u8| Name::from(format!("{kind}-{number}").as_str());
    let (source, event) = match step {
        Step::Service { source, name, genes } => {
            let object = Object::Service { namespace, name: named("svc", *name), service: Arc::new(service(*genes)) };
            (*source, Event::Apply(object))
        }
        Step::DeleteService { source, name } => {
            (*source, Event::Delete(ObjectKey { kind: Kind::Service, namespace, name: named("svc", *name) }))
        }
        Step::Slice { source, slice: name, service, genes } => {
            let group = Arc::new(slice(*name, genes));
            (
                *source,
                Event::Apply(Object::Endpoints { namespace, service: named("svc", *service), group, triggered: None }),
            )
        }
        Step::DeleteSlice { source, slice } => {
            (*source, Event::Delete(ObjectKey { kind: Kind::EndpointSlice, namespace, name: named("slice", *slice) }))
        }
        Step::Node { genes } => {
            let object = Object::Node { name: Name::from(NODE), node: Arc::new(node(*genes)) };
            (SourceId::Kubernetes, Event::Apply(object))
        }
        Step::Facts { .. } | Step::Grace(_) | Step::Crash(_) => return None,
    };
    Some(Update { source, events: vec![event] })
}

/// The agent and its kernel.
struct World {
    content: Content,
    limits: Limits,
    state: Option<State>,
    tables: Tables,
    /// What has to be done after a grace period, and what programs may still read until then.
    waiting: Vec<(Epoch, Vec<Op>, Tables)>,
    /// How many operations of the next plan are done before the agent dies.
    crash: Option<u8>,
    /// Problems as the plans told them.
    told: BTreeMap<ServiceKey, Vec<Problem>>,
}

/// Whom a client gets by a frontend, for clients inside and outside.
fn served(tables: &Tables, at: &FrontendAddr) -> Option<[bool; 2]> {
    let value = tables.frontends.get(at)?;
    let record = tables.services.get(&ServiceId(value.service))?;
    let nonempty = |flag: u32| {
        let word = if value.has(flag) { record.local } else { record.cluster };
        Range::unpack(word).count > 0
    };
    Some([nonempty(FrontendValue::INSIDE_LOCAL), nonempty(FrontendValue::OUTSIDE_LOCAL)])
}

/// True if packets are looked up for a frontend at all.
fn is_visible(tables: &Tables, at: &FrontendAddr) -> bool {
    if at.is_node_port() {
        let (word, shift) = port_index(at.port);
        return tables.ports.get(&word).is_some_and(|word| word.bits >> shift & PortUse::NODE_PORT != 0);
    }
    tables.addresses.get(&at.addr).is_some_and(|class| class.has(AddressClass::FRONTEND))
}

/// Every slot of every published range belongs to its service and names a backend that is there.
fn check_ranges(tables: &Tables) {
    for (id, record) in &tables.services {
        for range in [Range::unpack(record.cluster), Range::unpack(record.local)] {
            for position in range.base..range.base + range.count {
                if range.count == 0 {
                    break;
                }
                let slot =
                    tables.slots.get(&position).unwrap_or_else(|| panic!("slot {position} of {id} is unwritten"));
                assert_eq!(slot.owner, id.0, "slot {position}");
                assert!(tables.backends.contains_key(&BackendId(slot.backend)), "slot {position} of {id}: no backend");
            }
        }
    }
}

/// A program that read the old tables may go on with what it read: no id, slot or backend means something else yet.
fn check_unpublished(old: &Tables, now: &Tables) {
    for value in old.frontends.values() {
        let id = ServiceId(value.service);
        assert_eq!(old.names.get(&id), now.names.get(&id), "service id {id} was used again");
        let Some(record) = old.services.get(&id) else { continue };
        for range in [Range::unpack(record.cluster), Range::unpack(record.local)] {
            for position in range.base..range.base.saturating_add(range.count) {
                let slot = old.slots[&position];
                assert_eq!(now.slots.get(&position), Some(&slot), "slot {position} was used again");
                let backend = BackendId(slot.backend);
                let address = |tables: &Tables| tables.backends.get(&backend).map(|record| (record.addr, record.port));
                assert_eq!(address(old), address(now), "backend id {backend} was used again");
            }
        }
    }
}

/// What was served before and is served after must be served all the time.
fn check_continuity(before: &Tables, now: &Tables, after: &Tables) {
    for at in before.frontends.keys() {
        let (Some(old), Some(new)) = (served(before, at), served(after, at)) else { continue };
        let between = served(now, at).unwrap_or([false; 2]);
        for scope in 0..2 {
            assert!(!(old[scope] && new[scope]) || between[scope], "{at} lost its backends in between (scope {scope})");
        }
        let visible = !is_visible(before, at) || !is_visible(after, at) || is_visible(now, at);
        assert!(visible, "{at} was hidden in between");
    }
}

fn applied(tables: &Tables, ops: &[&Op]) -> Tables {
    let mut tables = tables.clone();
    ops.iter().for_each(|op| tables.apply(op));
    tables
}

impl World {
    fn new(limits: Limits) -> Self {
        let mut content = Content::new(Arc::new(facts(0)), &SOURCES);
        for spec in SOURCES {
            let events = vec![Event::Init(Kind::Service), Event::InitDone(Kind::Service)];
            content.apply(Update { source: spec.id, events });
        }
        assert!(content.snapshot().pending.is_empty());
        let state = Some(State::empty(limits, snat()));
        Self {
            content,
            limits,
            state,
            tables: Tables::default(),
            waiting: Vec::new(),
            crash: None,
            told: BTreeMap::new(),
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Grace(count) => self.pass_grace(usize::from(*count).min(self.waiting.len())),
            Step::Crash(after) => self.crash = Some(*after),
            Step::Facts { genes } => {
                self.content.set_facts(Arc::new(facts(*genes)));
                self.advance();
            }
            _ => {
                self.content.apply(events(step).expect("the other steps are above"));
                self.advance();
            }
        }
    }

    fn pass_grace(&mut self, count: usize) {
        for (epoch, ops, _) in self.waiting.drain(..count) {
            ops.iter().for_each(|op| self.tables.apply(op));
            let (state, _) = self.state.take().unwrap().grace_passed(epoch);
            self.state = Some(state);
        }
        check_ranges(&self.tables);
    }

    fn advance(&mut self) {
        let snapshot = Arc::new(self.content.snapshot().clone());
        let (state, plan) = self.state.take().unwrap().advance(&snapshot);
        let now: Vec<&Op> = plan.groups.iter().flat_map(|group| &group.now).collect();
        let after = applied(&self.tables, &now);
        let mut between = self.tables.clone();
        let crash = self.crash.take().map(usize::from);
        for (position, op) in now.iter().enumerate() {
            if crash == Some(position) {
                self.tables = between;
                return self.restart();
            }
            between.apply(op);
            check_ranges(&between);
            check_continuity(&self.tables, &between, &after);
        }
        self.check_stages(&plan, &after);
        self.told.extend(plan.problems.iter().cloned());
        let before = std::mem::replace(&mut self.tables, after);
        let later = plan.groups.into_iter().flat_map(|group| group.after_grace).collect();
        self.waiting.push((plan.epoch, later, before));
        self.waiting.iter().for_each(|(.., old)| check_unpublished(old, &self.tables));
        self.state = Some(state);
        if crash.is_some() {
            self.restart();
        }
    }

    /// Doing a plan stage by stage is as good as group by group.
    fn check_stages(&self, plan: &Plan, expected: &Tables) {
        let mut staged: Vec<_> = plan.staged().filter(|(stage, _)| *stage != Stage::Retire).collect();
        staged.sort_by_key(|(stage, _)| *stage);
        let mut between = self.tables.clone();
        for (_, op) in staged {
            between.apply(op);
            check_ranges(&between);
            check_continuity(&self.tables, &between, expected);
        }
        assert_eq!(between, *expected);
    }

    /// A new agent with what the kernel has: first without knowing any object, then with all of them.
    fn restart(&mut self) {
        self.waiting.clear();
        self.told.clear();
        self.state = Some(State::restore(self.limits, snat(), &self.tables));
        let unlisted =
            Arc::new(Snapshot::empty(self.content.snapshot().facts.clone(), SOURCES.iter().map(|spec| spec.id)));
        let (state, plan) = self.state.take().unwrap().advance(&unlisted);
        self.state = Some(state);
        let before = self.tables.clone();
        for op in plan.groups.iter().flat_map(|group| &group.now) {
            self.tables.apply(op);
            check_ranges(&self.tables);
            check_continuity(&before, &self.tables, &before);
        }
        let harmless = |op: &Op| !matches!(op, Op::RetireService { .. } | Op::RetireBackend { .. });
        assert!(plan.groups.iter().flat_map(|group| &group.after_grace).all(harmless), "{plan}");
        self.waiting.push((plan.epoch, Vec::new(), before));
        self.advance();
    }

    /// The tables without what only flows use.
    fn settled(&mut self) -> Tables {
        self.pass_grace(self.waiting.len());
        let mut tables = self.tables.clone();
        tables.addresses.values_mut().for_each(|class| class.flags &= !AddressClass::FLOWS);
        tables.addresses.retain(|_, class| class.flags != 0);
        tables
    }

    fn check_against_rebuild(&mut self) {
        let snapshot = Arc::new(self.content.snapshot().clone());
        let (rebuilt, plan) = State::empty(self.limits, snat()).advance(&snapshot);
        let mut fresh = Tables::default();
        plan.groups.iter().flat_map(|group| group.now.iter().chain(&group.after_grace)).for_each(|op| fresh.apply(op));
        let settled = self.settled();
        assert_eq!(settled.to_string(), fresh.to_string(), "left: by steps, right: rebuilt");
        let state = self.state.as_ref().unwrap();
        assert_eq!(state.problems(), rebuilt.problems());
        self.told.retain(|_, problems| !problems.is_empty());
        assert_eq!(self.told, state.problems(), "left: as told, right: as they are");
        assert_eq!(state.health_checks().by_port, rebuilt.health_checks().by_port);
        assert_eq!(state.health_checks().addresses, rebuilt.health_checks().addresses);
        assert_eq!((settled.names.len(), settled.backends.len()), (fresh.names.len(), fresh.backends.len()));
    }

    /// What the state says of the tables is so, and all of it: from nothing, it makes the same tables.
    fn check_stated(&mut self, most: usize) {
        let settled = self.settled();
        let state = self.state.as_ref().unwrap();
        let (mut place, mut written) = (Some(Place::default()), Tables::default());
        while let Some(at) = place {
            let stated = state.stated(&at, most);
            for (subject, op) in &stated.ops {
                assert!(self.tables.holds(op), "{subject:?}: {op:?}");
                assert!(
                    written.holds(op) || {
                        written.apply(op);
                        written.holds(op)
                    },
                    "{op:?} is not held when it is done"
                );
            }
            place = stated.rest;
        }
        written.addresses.values_mut().for_each(|class| class.flags &= !AddressClass::FLOWS);
        written.addresses.retain(|_, class| class.flags != 0);
        assert_eq!(written.to_string(), settled.to_string(), "left: as stated, right: as they are");
        assert_eq!((&written.names, &written.backends), (&settled.names, &settled.backends));
        assert_eq!((&written.frontends, &written.services), (&settled.frontends, &settled.services));
        assert_eq!((&written.addresses, &written.ports), (&settled.addresses, &settled.ports));
    }

    /// Nothing is left to do for a state read back from its own tables.
    fn check_restored_is_idle(&mut self) {
        self.settled();
        let snapshot = Arc::new(self.content.snapshot().clone());
        let (_, plan) = State::restore(self.limits, snat(), &self.tables).advance(&snapshot);
        assert!(plan.groups.is_empty(), "{plan}");
    }
}

/// Few by default, since each case is long; `PROPTEST_CASES` asks for more.
fn cases() -> ProptestConfig {
    let default = ProptestConfig::default();
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => default,
        None => ProptestConfig { cases: 64, ..default },
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn steps_lead_to_the_same_tables_as_a_rebuild(steps in prop::collection::vec(step(), 1..40)) {
        let mut world = World::new(LIMITS);
        for step in &steps {
            world.step(step);
        }
        world.advance();
        world.check_against_rebuild();
        world.check_restored_is_idle();
    }

    #[test]
    fn what_is_stated_of_the_tables_is_all_there_is(steps in prop::collection::vec(step(), 1..40), most in 1usize..5) {
        let mut world = World::new(LIMITS);
        for step in &steps {
            world.step(step);
        }
        world.advance();
        world.check_stated(most);
    }

    #[test]
    fn full_tables_break_no_promise(
        steps in prop::collection::vec(step(), 1..40),
        services in 1u32..6,
        backends in 1u32..6,
        slots in 0u32..12,
    ) {
        let mut world = World::new(Limits { services, backends, slots });
        for step in &steps {
            world.step(step);
        }
        world.settled();
        let used = |names: usize, limit: u32| names < limit as usize;
        prop_assert!(used(world.tables.names.len(), services) && used(world.tables.backends.len(), backends));
    }

    #[test]
    fn what_was_refused_gets_its_place_when_there_is_room(steps in prop::collection::vec(step(), 1..40)) {
        let mut world = World::new(Limits { services: 4, backends: 5, slots: 8 });
        for step in steps.iter().filter(|step| !matches!(step, Step::Crash(_))) {
            world.step(step);
        }
        // Everything goes but the services of one source with one slice; that finds room.
        for name in 0..4 {
            world.step(&Step::DeleteService { source: SourceId::Kubernetes, name });
            world.step(&Step::DeleteService { source: SourceId::Manifests, name });
        }
        for slice in 0..5 {
            world.step(&Step::DeleteSlice { source: SourceId::Kubernetes, slice });
            world.step(&Step::DeleteSlice { source: SourceId::Manifests, slice });
        }
        world.step(&Step::Slice { source: SourceId::Manifests, slice: 0, service: 0, genes: vec![1] });
        world.step(&Step::Service { source: SourceId::Manifests, name: 0, genes: 1 << 6 });
        for _ in 0..3 {
            world.pass_grace(world.waiting.len());
            world.advance();
        }
        world.limits = LIMITS;
        world.check_against_rebuild();
    }
}

#[test]
fn an_unlisted_source_keeps_what_the_tables_have_and_a_removed_one_does_not() {
    let mut world = World::new(LIMITS);
    let service = Step::Service { source: SourceId::Kubernetes, name: 0, genes: 0xffff_ffff };
    world.step(&service);
    world.step(&Step::Slice { source: SourceId::Kubernetes, slice: 0, service: 0, genes: vec![1, 7, 99] });
    let before = world.settled();
    assert!(!before.frontends.is_empty());
    let facts = world.content.snapshot().facts.clone();

    let pending = Arc::new(Snapshot::empty(facts.clone(), [SourceId::Kubernetes]));
    let (state, plan) = State::restore(LIMITS, snat(), &world.tables).advance(&pending);
    assert!(plan.groups.is_empty(), "{plan}");

    let removed = Arc::new(Snapshot::empty(facts, []));
    let (_, plan) = state.advance(&removed);
    let mut after = world.tables.clone();
    plan.groups.iter().flat_map(|group| group.now.iter().chain(&group.after_grace)).for_each(|op| after.apply(op));
    assert!(after.frontends.is_empty() && after.names.is_empty() && after.backends.is_empty(), "{after}");
}

/// Service `svc-NUMBER` with a ClusterIP of its own and nothing else.
fn plain_service(number: u8) -> Object {
    let service = Service {
        cluster_ips: ByFamily { v4: Some(v4(96, number.into())), v6: None },
        external_ips: Box::default(),
        load_balancer_ips: Box::default(),
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        ..service(0)
    };
    let name = Name::from(format!("svc-{number}").as_str());
    Object::Service { namespace: Name::from("default"), name, service: Arc::new(service) }
}

/// 10.244.0.2 becomes an address of this node.
#[test]
fn an_address_of_the_node_changes_only_services_with_an_endpoint_there_and_no_node_name() {
    let mut world = World::new(LIMITS);
    // Endpoint 10.244.0.2 without node name, with one, and another endpoint without.
    let endpoints = [4, 4 + 18, 1];
    for (name, genes) in (0..).zip(endpoints) {
        world.content.apply(Update { source: SourceId::Kubernetes, events: vec![Event::Apply(plain_service(name))] });
        world.step(&Step::Slice { source: SourceId::Kubernetes, slice: name, service: name, genes: vec![genes] });
    }
    let listed = |name: &str| {
        let key = ServiceKey { source: SourceId::Kubernetes, namespace: Name::from("default"), name: Name::from(name) };
        world.content.snapshot().endpoints[&key].groups()[0].subsets[0].endpoints[0].clone()
    };
    assert_eq!(["svc-0", "svc-1", "svc-2"].map(|name| listed(name).addr), [v4(244, 1), v4(244, 1), v4(244, 0)]);
    assert_eq!(["svc-0", "svc-1", "svc-2"].map(|name| listed(name).node.is_none()), [true, false, true]);

    let mut next = world.content.snapshot().clone();
    let local = LocalAddress { addr: v4(244, 1), device: Name::from("eth0") };
    next.facts = Arc::new(NodeFacts { addresses: Box::new([local]), ..NodeFacts::clone(&next.facts) });
    let mut state = world.state.take().unwrap();
    let before = state.planned.take();
    let changed = state.changed_services(before.as_ref(), &next, &NodeView::of(&next));
    assert_eq!(changed.iter().map(|key| key.name.to_string()).collect::<Vec<_>>(), ["svc-0"]);
    assert!(
        state
            .changed_services(before.as_ref(), &before.as_ref().unwrap().0, &NodeView::of(&before.as_ref().unwrap().0))
            .is_empty()
    );
}

/// A restart while a part of a source cannot be read.
#[test]
fn what_a_source_could_not_read_stays_as_the_tables_have_it_and_all_else_goes_on() {
    let mut world = World::new(LIMITS);
    let plain = |number: u8| Update { source: SourceId::Kubernetes, events: vec![Event::Apply(plain_service(number))] };
    for name in 0..3 {
        world.content.apply(plain(name));
        let genes = vec![1 + u16::from(name) * 3];
        world.step(&Step::Slice { source: SourceId::Kubernetes, slice: name, service: name, genes });
    }
    let before = world.settled();
    assert_eq!(before.names.len(), 3, "{before}");

    // Service 0 with another endpoint; of service 1 only the object, of service 2 nothing.
    let facts = world.content.snapshot().facts.clone();
    world.content = Content::new(facts, &SOURCES);
    world.state = Some(State::restore(LIMITS, snat(), &world.tables));
    world.told.clear();
    let tell = |world: &mut World, source, events| _ = world.content.apply(Update { source, events });
    tell(&mut world, SourceId::Kubernetes, vec![Event::Init(Kind::Service), Event::Unread(true)]);
    for name in 0..2 {
        world.content.apply(plain(name));
    }
    let slice = Step::Slice { source: SourceId::Kubernetes, slice: 0, service: 0, genes: vec![1, 4] };
    world.content.apply(events(&slice).unwrap());
    tell(&mut world, SourceId::Kubernetes, vec![Event::InitDone(Kind::Service)]);
    tell(&mut world, SourceId::Manifests, vec![Event::Init(Kind::Service), Event::InitDone(Kind::Service)]);
    world.advance();
    let text = world.settled().to_string();
    let of = |text: &str, name: u8| {
        let head = format!("service kubernetes/default/svc-{name}:");
        let lines = text.lines().skip_while(|line| !line.starts_with(&head)).skip(1);
        lines.take_while(|line| line.starts_with(' ')).collect::<Vec<_>>().join("\n")
    };
    for name in [1, 2] {
        assert!(of(&text, name).contains("10.244"), "{text}");
        assert_eq!(of(&text, name), of(&before.to_string(), name));
    }
    assert_ne!(of(&text, 0), of(&before.to_string(), 0), "{text}");

    tell(&mut world, SourceId::Kubernetes, vec![Event::Unread(false)]);
    world.advance();
    let text = world.settled().to_string();
    assert!(of(&text, 1).contains("reject") && of(&text, 2).is_empty(), "{text}");
    world.check_against_rebuild();
}

#[test]
fn contradictions_in_the_tables_are_repaired() {
    let mut world = World::new(LIMITS);
    world.step(&Step::Service { source: SourceId::Kubernetes, name: 0, genes: 0xffff_ffff });
    world.step(&Step::Slice { source: SourceId::Kubernetes, slice: 0, service: 0, genes: vec![1, 7, 99] });
    world.settled();
    // A second id with the first name, a foreign name, a backend twice, a slot of another owner, a frontend of nobody.
    let (first, name) = world.tables.names.first_key_value().map(|(id, name)| (*id, name.clone())).unwrap();
    let record = world.tables.services[&first];
    let (_, backend) = world.tables.backends.first_key_value().unwrap();
    let backend = *backend;
    world.tables.backends.insert(BackendId(200), backend);
    world.tables.names.extend([(ServiceId(90), name), (ServiceId(91), "what is this".to_owned())]);
    world.tables.services.insert(ServiceId(90), record);
    world.tables.frontends.insert(
        FrontendAddr { addr: v4(7, 7), port: Port(7), proto: proxy_common::addr::Proto::TCP },
        FrontendValue { service: 92, flags: 0 },
    );
    let base = Range::unpack(record.cluster).base;
    world.tables.slots.insert(base, proxy_common::abi::service::Slot { backend: 1, owner: 77 });

    world.state = Some(State::restore(LIMITS, snat(), &world.tables));
    let snapshot = Arc::new(world.content.snapshot().clone());
    let (state, plan) = world.state.take().unwrap().advance(&snapshot);
    plan.groups
        .iter()
        .flat_map(|group| group.now.iter().chain(&group.after_grace))
        .for_each(|op| world.tables.apply(op));
    world.state = Some(state);
    check_ranges(&world.tables);
    world.check_against_rebuild();
}

/// An agent died before it could clear an old id of a backend; the service that names it finds no room for new slots.
#[test]
fn a_service_without_room_keeps_a_backend_that_another_id_has_too() {
    let mut world = World::new(LIMITS);
    world.step(&Step::Service { source: SourceId::Kubernetes, name: 0, genes: 0x155 });
    world.step(&Step::Slice { source: SourceId::Kubernetes, slice: 0, service: 0, genes: vec![1] });
    world.settled();
    let (position, slot) = world.tables.slots.first_key_value().map(|(position, slot)| (*position, *slot)).unwrap();
    let backend = world.tables.backends[&BackendId(slot.backend)];
    world.tables.backends.insert(BackendId(200), backend);
    world.tables.slots.insert(position, proxy_common::abi::service::Slot { backend: 200, ..slot });
    world.limits.slots = 1;
    world.state = Some(State::restore(world.limits, snat(), &world.tables));
    world.advance();
    world.settled();
    assert!(world.tables.to_string().contains("10.244.0."), "{}", world.tables);
    assert_eq!(world.state.as_ref().unwrap().problems().len(), 1);
}

#[test]
fn a_pruned_address_is_forgotten() {
    let mut world = World::new(LIMITS);
    world.step(&Step::Service { source: SourceId::Kubernetes, name: 0, genes: 0xffff_ffff });
    world.step(&Step::DeleteService { source: SourceId::Kubernetes, name: 0 });
    world.settled();
    let lingering: Vec<_> = world.tables.addresses.keys().copied().collect();
    assert!(!lingering.is_empty());
    for addr in lingering {
        let (state, plan) = world.state.take().unwrap().prune_address(addr);
        plan.groups.iter().flat_map(|group| &group.now).for_each(|op| world.tables.apply(op));
        world.state = Some(state);
    }
    assert!(world.tables.addresses.is_empty(), "{}", world.tables);
}

#[test]
fn one_changed_endpoint_changes_only_its_service() {
    let mut world = World::new(LIMITS);
    let mut touched = BTreeMap::new();
    for name in 0..4 {
        world.step(&Step::Service { source: SourceId::Kubernetes, name, genes: 0x155 + u64::from(name) * 7919 });
        world.step(&Step::Slice { source: SourceId::Kubernetes, slice: name, service: name, genes: vec![1] });
    }
    let changed = Step::Slice { source: SourceId::Kubernetes, slice: 2, service: 2, genes: vec![1, 4] };
    world.content.apply(events(&changed).unwrap());
    let snapshot = Arc::new(world.content.snapshot().clone());
    let (_, plan) = world.state.take().unwrap().advance(&snapshot);
    for group in &plan.groups {
        *touched.entry(group.subject.to_string()).or_insert(0) += group.now.len();
    }
    assert!(
        touched.keys().all(|subject| ["service kubernetes/default/svc-2", "leftovers"].contains(&subject.as_str()))
    );
}
