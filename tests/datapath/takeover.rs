//! What a later load finds: it adopts what fits, refuses what does not, and one agent owns a directory.

use proxy_common::abi::backend::BackendRecord;
use proxy_common::addr::Port;
use proxy_userspace::datapath::kernel::{self, Error, Sizes};
use proxy_userspace::datapath::maps::{KernelMaps, Maps as _, NodeConfig};
use proxy_userspace::datapath::object::OBJECT;
use proxy_userspace::datapath::pins::{self, Pins};
use proxy_userspace::datapath::restore;
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
fn other_sizes_are_refused_by_name_and_change_nothing() {
    let bed = Bed::new();
    let pins = prepared(&bed);
    let record = BackendRecord { state: BackendRecord::STATE_LIVE, ..BackendRecord::ZERO };
    let loaded = kernel::load(OBJECT, &pins, &SIZES).unwrap();
    KernelMaps::open(&loaded.maps).unwrap().apply(&[&Op::PutBackend { id: BackendId(3), record }]).unwrap();
    let error = kernel::load(OBJECT, &pins, &Sizes { backends: 256, ..SIZES }).unwrap_err();
    let Error::Layout(mismatches) = &error else { panic!("{error}") };
    let maps: Vec<_> = mismatches.iter().map(|mismatch| mismatch.map.as_str()).collect();
    assert_eq!(maps, ["addresses", "backends", "slots"], "{error}");
    assert!(error.to_string().contains("capacity of backends is 128, wanted 256"), "{error}");
    assert_eq!(restore::read_tables(&loaded.maps).unwrap().backends.len(), 1);
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
    let names: Vec<_> = pins::list(&pins.maps()).unwrap();
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
    pins.remove_directories().unwrap_err();
    pins::remove_layout(&pins.maps()).unwrap();
    pins.remove_directories().unwrap();
    assert_eq!(mounts(), 0);
}
