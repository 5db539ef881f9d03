//! What a later load finds: it adopts what fits, takes over from what does not, and one agent owns a directory.

use std::net::Ipv4Addr;
use std::time::Instant;

use proxy_common::abi::ABI_VERSION;
use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::flow::{FlowKey, FlowValue};
use proxy_common::addr::{Addr, Port, Proto};
use proxy_common::lb::flow::Hot;
use proxy_common::lb::tuple::Tuple;
use proxy_userspace::datapath::kernel::{self, Error, MapFds, Sizes};
use proxy_userspace::datapath::maps::{KernelMaps, Maps as _, NodeConfig};
use proxy_userspace::datapath::object::OBJECT;
use proxy_userspace::datapath::pins::{self, Pins};
use proxy_userspace::datapath::{inspect, restore, sys};
use proxy_userspace::planner::{BackendId, Op};
use shunt_tests::bed::Bed;

const SIZES: Sizes = Sizes { services: 64, backends: 128, flows: 64 };

fn prepared(bed: &Bed) -> Pins {
    let pins = Pins::new(bed.bpffs("bpf").join("shunt"));
    pins.prepare().unwrap();
    pins
}

fn node_config(hash_key: u64) -> NodeConfig {
    let range = (Port(1), Port(2));
    NodeConfig { new_hash_key: [hash_key; 2], netns: 7, flags: 0, snat: range, local: range }
}

/// Name of a layout, so many versions after our own.
fn named(after: u32, generation: &str) -> String {
    format!("v{}{generation}", ABI_VERSION + after)
}

#[test]
fn a_second_load_adopts_the_tables_and_keeps_the_hash_key() {
    let bed = Bed::new();
    let pins = prepared(&bed);
    let record = BackendRecord { state: BackendRecord::STATE_LIVE, proto: 6, ..BackendRecord::ZERO };
    let first = kernel::load(OBJECT, &pins, &SIZES).unwrap();
    assert!(!first.adopted);
    let mut maps = KernelMaps::open(&first.maps).unwrap();
    maps.apply(&[&Op::PutBackend { id: BackendId(3), record }]).unwrap();
    maps.write_node_config(&node_config(11)).unwrap();
    drop((maps, first));

    let second = kernel::load(OBJECT, &pins, &SIZES).unwrap();
    assert!(second.adopted);
    let maps = KernelMaps::open(&second.maps).unwrap();
    maps.write_node_config(&node_config(12)).unwrap();
    assert_eq!(maps.config().unwrap().hash_key, [11; 2], "picks stay the same over a restart");
    let tables = restore::read_tables(&second.maps).unwrap();
    assert_eq!(tables.backends.get(&BackendId(3)), Some(&record));
    let limits = restore::read_limits(&second.maps).unwrap();
    assert_eq!((limits.services, limits.backends), (64, 128));
}

#[test]
fn sizes_below_what_is_in_use_are_refused_by_name_and_change_nothing() {
    let bed = Bed::new();
    let pins = prepared(&bed);
    let record = BackendRecord { state: BackendRecord::STATE_LIVE, ..BackendRecord::ZERO };
    let loaded = kernel::load(OBJECT, &pins, &SIZES).unwrap();
    KernelMaps::open(&loaded.maps).unwrap().apply(&[&Op::PutBackend { id: BackendId(100), record }]).unwrap();
    let error = kernel::load(OBJECT, &pins, &Sizes { backends: 64, ..SIZES }).unwrap_err();
    let Error::TooSmall(_) = &error else { panic!("{error}") };
    let told = "1 backends, up to id 100, are in use, --max-backends is 64; nothing was changed";
    assert_eq!(error.to_string(), told);
    assert_eq!(restore::read_tables(&loaded.maps).unwrap().backends.len(), 1);
    assert_eq!(layouts(&pins), [named(0, "")]);
}

fn layouts(pins: &Pins) -> Vec<String> {
    let layouts = pins.layouts().unwrap().iter().map(ToString::to_string).collect();
    assert!(!pins.preparation().exists());
    layouts
}

fn id_of(maps: &MapFds, name: &str) -> u32 {
    sys::map_info(maps.get(name).unwrap()).unwrap().id
}

/// Entries of connection `number`, its source rewritten, last seen now.
fn connection(number: u32) -> [(FlowKey, FlowValue); 3] {
    let addr = |word: u32| Addr::from(Ipv4Addr::from(word));
    let (client, vip, backend, node) =
        (addr(0x0a00_0000 + number), addr(0x0a60_0001), addr(0x0af4_0201), addr(0xc000_0201));
    let port = |port| Port(port).be();
    let nat_port = port(10_000 + (number % 20_000) as u16);
    let to = |src, sport, dst, dport| Tuple { src, dst, sport, dport, proto: Proto::TCP };
    let hot = (sys::monotonic().as_nanos() as u64 >> 30) << 32 | u64::from(Hot::ESTABLISHED);
    let (plain, client_is_a) = to(client, port(4000), backend, port(80)).plain_key();
    let flags = FlowValue::SNAT | if client_is_a { FlowValue::CLIENT_IS_A } else { 0 };
    let value = FlowValue { hot, nat: node, nat_port, flags, peer: vip, peer_port: port(80), ..FlowValue::ZERO };
    let front = FlowValue { hot, peer: backend, ..value };
    let snat = FlowValue { peer: client, peer_port: port(4000), ..value };
    // Sources stay apart by the backend's port: there are more connections than ports.
    let backend_port = port(1 + (number / 20_000) as u16);
    [
        (to(client, port(4000), vip, port(80)).front_key(), front),
        (plain, value),
        (to(backend, backend_port, node, nat_port).snat_key(), snat),
    ]
}

fn fill(maps: &MapFds, connections: std::ops::Range<u32>) {
    let (keys, values): (Vec<_>, Vec<_>) = connections.flat_map(connection).unzip();
    sys::map_update_batch(maps.get("flows").unwrap(), &keys, &values).unwrap();
}

fn flow(maps: &MapFds, key: &FlowKey) -> Option<FlowValue> {
    let mut value = [FlowValue::ZERO];
    sys::map_lookup(maps.get("flows").unwrap(), key, &mut value).unwrap().then_some(value[0])
}

/// What the old programs do between the steps is in the new tables in the end, and what the new ones did stays. The numbers
/// printed are what the crate's documentation says of time.
#[test]
fn other_sizes_get_tables_of_their_own_with_all_that_the_old_ones_have() {
    const CONNECTIONS: u32 = 200_000;
    let bed = Bed::new();
    let pins = prepared(&bed);
    let sizes = Sizes { flows: CONNECTIONS + 1000, ..SIZES };
    let old = kernel::load(OBJECT, &pins, &sizes).unwrap();
    KernelMaps::open(&old.maps).unwrap().write_node_config(&node_config(11)).unwrap();
    fill(&old.maps, 0..CONNECTIONS);

    let start = Instant::now();
    let new = kernel::load(OBJECT, &pins, &Sizes { flows: 2 * sizes.flows, ..sizes }).unwrap();
    println!("prepared after {:?}", start.elapsed());
    assert!(new.adopted);
    assert_eq!(
        pins.current().unwrap().unwrap().to_string(),
        named(0, ""),
        "the old one counts until the links are flipped"
    );
    for name in ["services", "flows_pending", "sockets", "affinity"] {
        assert_eq!(id_of(&new.maps, name), id_of(&old.maps, name), "{name} is shared");
    }
    for name in ["flows", "config"] {
        assert_ne!(id_of(&new.maps, name), id_of(&old.maps, name), "{name} is copied");
    }
    // Two come, one goes, one moves on, before the links are flipped.
    fill(&old.maps, CONNECTIONS..CONNECTIONS + 2);
    connection(0).iter().for_each(|(key, _)| assert!(sys::map_delete(old.maps.get("flows").unwrap(), key).unwrap()));
    let (key, value) = connection(1)[1];
    let closing = FlowValue { hot: value.hot | u64::from(Hot::FIN_CLIENT), ..value };
    sys::map_update(old.maps.get("flows").unwrap(), &key, &closing).unwrap();

    let mut handover = new.handover.unwrap();
    let start = Instant::now();
    handover.close().unwrap();
    println!("closed after {:?}", start.elapsed());
    assert_eq!(pins.current().unwrap().unwrap().to_string(), named(0, "-2"));
    let settles_at = |maps: &MapFds| restore::read_config(maps).unwrap().settles_at;
    assert_ne!(settles_at(&old.maps), 0, "the old programs open nothing for now");
    assert_ne!(settles_at(&new.maps), 0);
    assert_eq!(flow(&new.maps, &connection(0)[0].0), None);
    assert_eq!(flow(&new.maps, &key), Some(closing));

    // While links are flipped: both have it, and each sees another end close; one is proven where the old programs run.
    let (key, value) = connection(2)[1];
    for (maps, state) in [(&old.maps, Hot::FIN_CLIENT), (&new.maps, Hot::FIN_BACKEND)] {
        let value = FlowValue { hot: value.hot | u64::from(state), ..value };
        sys::map_update(maps.get("flows").unwrap(), &key, &value).unwrap();
    }
    fill(&old.maps, CONNECTIONS + 2..CONNECTIONS + 3);
    let start = Instant::now();
    handover.finish().unwrap();
    println!("finished after {:?}", start.elapsed());
    let state = Hot::unpack(flow(&new.maps, &key).unwrap().hot).state;
    assert_eq!(state, Hot::ESTABLISHED | Hot::FIN_CLIENT | Hot::FIN_BACKEND);
    assert_eq!(settles_at(&new.maps), 0);
    assert_eq!(inspect::count(&new.maps, "flows").unwrap().0, 3 * (CONNECTIONS as usize + 2));
    for number in [3, CONNECTIONS - 1, CONNECTIONS + 2] {
        connection(number).iter().for_each(|(key, value)| {
            let copied = flow(&new.maps, key).unwrap();
            assert_eq!(FlowValue { hot: 0, ..copied }, FlowValue { hot: 0, ..*value });
        });
    }
    drop(handover);
    pins.remove_other_layouts(pins.current().unwrap().unwrap()).unwrap();
    assert_eq!(layouts(&pins), [named(0, "-2")]);
    assert_eq!(restore::read_config(&new.maps).unwrap().hash_key, [11; 2]);
}

/// A version that differs by its number alone: every map but those of sockets is copied.
#[test]
fn another_version_shares_with_the_old_one_what_lies_with_sockets_alone() {
    let bed = Bed::new();
    let pins = prepared(&bed);
    let old = kernel::load(OBJECT, &pins, &SIZES).unwrap();
    let record = BackendRecord { state: BackendRecord::STATE_LIVE, proto: 6, ..BackendRecord::ZERO };
    KernelMaps::open(&old.maps).unwrap().apply(&[&Op::PutBackend { id: BackendId(3), record }]).unwrap();
    fill(&old.maps, 0..10);
    let next = pins.clone().with_version(Some(ABI_VERSION + 1));
    let new = kernel::load(OBJECT, &next, &SIZES).unwrap();
    for (name, _) in new.maps.iter() {
        let is_shared = id_of(&new.maps, name) == id_of(&old.maps, name);
        assert_eq!(is_shared, name.starts_with("sockets"), "{name}");
    }
    assert_eq!(restore::read_tables(&new.maps).unwrap(), restore::read_tables(&old.maps).unwrap());
    assert_eq!(inspect::count(&new.maps, "flows").unwrap().0, 30);
    // It is given up: nothing of it is left, and nobody is held.
    drop(new);
    assert_eq!(layouts(&pins), [named(0, "")]);
    assert_eq!(restore::read_config(&old.maps).unwrap().settles_at, 0);
}

/// An agent died when links ran the programs of either layout; old programs went on for a while.
#[test]
fn what_an_interrupted_takeover_left_in_the_older_layout_is_added_to_the_newer() {
    let bed = Bed::new();
    let pins = prepared(&bed);
    let old = kernel::load(OBJECT, &pins, &SIZES).unwrap();
    let next = pins.clone().with_version(Some(ABI_VERSION + 1));
    let mut new = kernel::load(OBJECT, &next, &SIZES).unwrap();
    new.handover.as_mut().unwrap().close().unwrap();
    fill(&old.maps, 0..4);
    drop(new);
    assert_eq!(layouts(&pins), [named(0, ""), named(1, "-2")]);
    let again = kernel::load(OBJECT, &next, &SIZES).unwrap();
    assert!(again.adopted && again.handover.is_none(), "it is the layout that is wanted");
    assert_eq!(inspect::count(&again.maps, "flows").unwrap().0, 12);
    // Another one goes on from there.
    drop(again);
    let third = kernel::load(OBJECT, &pins.clone().with_version(Some(ABI_VERSION + 2)), &SIZES).unwrap();
    assert_eq!(inspect::count(&third.maps, "flows").unwrap().0, 12);
    // One that cannot read the newer begins from the older, and lets nobody wait.
    drop(third);
    let back = kernel::load(OBJECT, &pins, &SIZES).unwrap();
    assert_eq!(id_of(&back.maps, "flows"), id_of(&old.maps, "flows"));
    KernelMaps::open(&back.maps).unwrap().write_node_config(&node_config(1)).unwrap();
    assert_eq!(restore::read_config(&back.maps).unwrap().settles_at, 0);
}

#[test]
fn scratch_maps_are_not_pinned_and_programs_of_two_loads_do_not_mix() {
    let bed = Bed::new();
    let pins = prepared(&bed);
    let first = kernel::load(OBJECT, &pins, &SIZES).unwrap();
    first.continuations.pin(&pins).unwrap();
    let second = kernel::load(OBJECT, &pins, &SIZES).unwrap();
    second.continuations.pin(&pins).unwrap();
    let count = |pins: &Pins| pins::list(&pins.continuations()).unwrap().len();
    assert_eq!(count(&pins), 2);
    second.continuations.prune_others(&pins).unwrap();
    assert_eq!(count(&pins), 1);
    let names: Vec<_> = pins::list(&pins.maps(pins.current().unwrap().unwrap())).unwrap();
    assert!(names.iter().all(|path| path.file_name().is_some_and(|name| name != "programs" && name != "drafts")));
}

#[test]
fn one_lock_at_a_time() {
    let bed = Bed::new();
    let pins = prepared(&bed);
    let lock = pins.lock().unwrap();
    let error = pins.lock().unwrap_err();
    assert!(error.to_string().contains("another agent owns"), "{error}");
    drop(lock);
    pins.lock().unwrap();
}

#[test]
fn a_bpf_file_system_is_mounted_only_where_there_is_none() {
    let bed = Bed::new();
    let plain = bed.subdir("plain").join("shunt");
    let pins = Pins::new(&plain);
    pins.prepare().unwrap();
    let mounts = || std::fs::read_to_string("/proc/self/mounts").unwrap().matches(bed.id()).count();
    assert_eq!(mounts(), 1);
    pins.prepare().unwrap();
    assert_eq!(mounts(), 1, "the second time there is one");
    let layout = pins.begin_preparation().and_then(|_| pins.commit()).unwrap();
    pins.remove_directories().unwrap_err();
    pins.remove(layout).unwrap();
    pins.remove_directories().unwrap();
    assert_eq!(mounts(), 0);
}
