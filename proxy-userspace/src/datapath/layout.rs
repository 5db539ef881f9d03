//! From one layout of the tables to another: which of them are shared, copied or made, and whether what is in use fits.
//!
//! Pure.

use std::collections::BTreeMap;
use std::fmt;

use aya_obj::generated::bpf_map_type;

use super::kernel::Sizes;
use super::sys::MapInfo;

/// Maps by name.
pub type Maps = BTreeMap<String, MapInfo>;

/// What becomes of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The very same map serves both layouts.
    Share,
    /// A new one takes over the entries.
    Copy,
    /// A new one begins empty.
    Make,
}

/// A pinned map that is not what the object declares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Map name.
    pub map: String,
    /// Property by which it differs.
    pub property: &'static str,
    /// As pinned.
    pub pinned: u32,
    /// As the object wants it.
    pub wanted: u32,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} is {}, wanted {}", self.property, self.map, self.pinned, self.wanted)
    }
}

/// The property that may differ within a version.
const CAPACITY: &str = "capacity";

/// Properties by which two maps differ.
pub fn compare(name: &str, pinned: &MapInfo, wanted: &MapInfo) -> Vec<Mismatch> {
    let properties = [
        ("type", pinned.kind, wanted.kind),
        ("key size", pinned.key_size, wanted.key_size),
        ("value size", pinned.value_size, wanted.value_size),
        (CAPACITY, pinned.max_entries, wanted.max_entries),
        ("flags", pinned.flags, wanted.flags),
    ];
    let differs = properties.into_iter().filter(|(_, pinned, wanted)| pinned != wanted);
    differs.map(|(property, pinned, wanted)| Mismatch { map: name.to_owned(), property, pinned, wanted }).collect()
}

/// True if the wanted maps can be those that are pinned; what is missing can be added.
pub fn fits(pinned: &Maps, wanted: &Maps) -> bool {
    wanted.iter().all(|(name, wanted)| pinned.get(name).is_none_or(|pinned| compare(name, pinned, wanted).is_empty()))
}

/// The map that is never shared: each layout's programs are told by it whether they may change flows.
pub const CONFIG: &str = "config";

/// What becomes of each wanted map, if the pinned ones have the same version.
///
/// Errors: maps whose records are others. A version has one form of records; the builds differ by more than they say.
pub fn steps(pinned: &Maps, wanted: &Maps) -> Result<BTreeMap<String, Step>, Vec<Mismatch>> {
    let mut wrong = Vec::new();
    let mut step = |(name, wanted): (&String, &MapInfo)| {
        let Some(pinned) = pinned.get(name) else { return (name.clone(), Step::Make) };
        let differences = compare(name, pinned, wanted);
        let step = if differences.is_empty() && name != CONFIG { Step::Share } else { Step::Copy };
        wrong.extend(differences.into_iter().filter(|difference| difference.property != CAPACITY));
        (name.clone(), step)
    };
    let steps = wanted.iter().map(&mut step).collect();
    if wrong.is_empty() { Ok(steps) } else { Err(wrong) }
}

/// What becomes of each wanted map, if the pinned ones have another version: what lies with sockets can be reached by no
/// copy, so it is shared if its size allows it.
pub fn steps_from_other_version(pinned: &Maps, wanted: &Maps) -> BTreeMap<String, Step> {
    let storage = bpf_map_type::BPF_MAP_TYPE_SK_STORAGE as u32;
    let step = |(name, wanted): (&String, &MapInfo)| {
        let step = match pinned.get(name) {
            None => Step::Make,
            Some(pinned) if wanted.kind != storage && pinned.kind != storage => Step::Copy,
            Some(pinned) if compare(name, pinned, wanted).is_empty() => Step::Share,
            Some(_) => Step::Make,
        };
        (name.clone(), step)
    };
    wanted.iter().map(step).collect()
}

/// How much of each table is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Service ports.
    pub services: u32,
    /// The highest id of one.
    pub last_service: u32,
    /// Backends.
    pub backends: u32,
    /// The highest id of one.
    pub last_backend: u32,
    /// Where the slots in use end.
    pub slots: u32,
    /// Frontends.
    pub frontends: u32,
    /// Addresses with a class.
    pub addresses: u32,
    /// Entries of proven flows.
    pub flows: u32,
}

/// Something in use that a wanted size has no room for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excess {
    /// In words, with its number.
    pub used: String,
    /// The flag.
    pub flag: &'static str,
    /// Its value.
    pub size: u32,
    /// What that has room for, where it is not the value itself.
    pub room: Option<u32>,
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in use, {} is {}", self.used, self.flag, self.size)?;
        self.room.map_or(Ok(()), |room| write!(f, ", which has room for {room}"))
    }
}

/// All that does not fit.
pub fn check(usage: &Usage, sizes: &Sizes) -> Vec<Excess> {
    let capacities: BTreeMap<_, _> = sizes.by_map().into_iter().collect();
    let by_id = |what: &str, count: u32, last: u32, flag, size| {
        let used =
            if count >= size { format!("{count} {what} are") } else { format!("{count} {what}, up to id {last}, are") };
        (last >= size).then_some(Excess { used, flag, size, room: None })
    };
    let by_count = |what: &str, map: &str, count: u32, flag, size| {
        let room = capacities[map];
        (count > room).then(|| Excess { used: format!("{count} {what} are"), flag, size, room: Some(room) })
    };
    let (services, backends, flows) = ("--max-services", "--max-backends", "--max-flows");
    let excesses = [
        by_id("service ports", usage.services, usage.last_service, services, sizes.services),
        by_count("frontends", "frontends", usage.frontends, services, sizes.services),
        by_id("backends", usage.backends, usage.last_backend, backends, sizes.backends),
        by_count("slots", "slots", usage.slots, backends, sizes.backends),
        by_count("addresses", "addresses", usage.addresses, backends, sizes.backends),
        by_count("entries of connections", "flows", usage.flows, flows, sizes.flows),
    ];
    excesses.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: MapInfo = MapInfo { id: 7, kind: 1, key_size: 4, value_size: 8, max_entries: 16, flags: 0 };
    const STORAGE: MapInfo =
        MapInfo { kind: bpf_map_type::BPF_MAP_TYPE_SK_STORAGE as u32, max_entries: 0, flags: 1, ..HASH };

    fn maps(maps: &[(&str, MapInfo)]) -> Maps {
        maps.iter().map(|(name, info)| ((*name).to_owned(), *info)).collect()
    }

    #[test]
    fn every_property_but_the_id_counts() {
        assert_eq!(compare("m", &HASH, &MapInfo { id: 0, ..HASH }), []);
        let others = [
            MapInfo { kind: 2, ..HASH },
            MapInfo { key_size: 8, ..HASH },
            MapInfo { value_size: 9, ..HASH },
            MapInfo { max_entries: 17, ..HASH },
            MapInfo { flags: 1, ..HASH },
        ];
        for wanted in others {
            assert_eq!(compare("m", &HASH, &wanted).len(), 1, "{wanted:?}");
        }
    }

    #[test]
    fn a_map_that_is_missing_is_no_hindrance_and_one_that_differs_is() {
        let pinned = maps(&[("flows", HASH), ("old", HASH)]);
        assert!(fits(&pinned, &maps(&[("flows", HASH), ("new", HASH)])));
        assert!(!fits(&pinned, &maps(&[("flows", MapInfo { max_entries: 32, ..HASH })])));
    }

    #[test]
    fn within_a_version_only_other_capacities_are_copied_and_the_configuration() {
        let grown = MapInfo { max_entries: 32, ..HASH };
        let pinned = maps(&[("config", HASH), ("flows", HASH), ("affinity", HASH), ("sockets", STORAGE)]);
        let wanted =
            maps(&[("config", HASH), ("flows", grown), ("affinity", HASH), ("sockets", STORAGE), ("new", HASH)]);
        let steps = steps(&pinned, &wanted).unwrap();
        let expected = [
            ("affinity", Step::Share),
            ("config", Step::Copy),
            ("flows", Step::Copy),
            ("new", Step::Make),
            ("sockets", Step::Share),
        ];
        let steps: Vec<_> = steps.iter().map(|(name, step)| (name.as_str(), *step)).collect();
        assert_eq!(steps, expected);
    }

    #[test]
    fn other_records_of_the_same_version_are_named() {
        let wanted = maps(&[("flows", MapInfo { value_size: 16, max_entries: 32, ..HASH })]);
        let wrong = steps(&maps(&[("flows", HASH)]), &wanted).unwrap_err();
        let text: Vec<_> = wrong.iter().map(ToString::to_string).collect();
        assert_eq!(text, ["value size of flows is 8, wanted 16"]);
    }

    #[test]
    fn of_another_version_everything_is_copied_but_what_lies_with_sockets() {
        let other = MapInfo { value_size: 12, ..STORAGE };
        let pinned = maps(&[("flows", HASH), ("sockets", STORAGE), ("sockets_udp", STORAGE)]);
        let wanted = maps(&[("flows", HASH), ("new", HASH), ("sockets", STORAGE), ("sockets_udp", other)]);
        let steps = steps_from_other_version(&pinned, &wanted);
        let steps: Vec<_> = steps.values().copied().collect();
        assert_eq!(steps, [Step::Copy, Step::Make, Step::Share, Step::Make]);
    }

    #[test]
    fn what_does_not_fit_is_named_with_its_flag() {
        let sizes = Sizes { services: 8, backends: 16, flows: 10 };
        assert_eq!(check(&Usage { last_service: 7, last_backend: 15, slots: 64, ..Usage::default() }, &sizes), []);
        let usage = Usage {
            services: 12,
            last_service: 12,
            last_backend: 16,
            backends: 3,
            slots: 65,
            flows: 31,
            ..Usage::default()
        };
        let text: Vec<_> = check(&usage, &sizes).iter().map(ToString::to_string).collect();
        let expected = [
            "12 service ports are in use, --max-services is 8",
            "3 backends, up to id 16, are in use, --max-backends is 16",
            "65 slots are in use, --max-backends is 16, which has room for 64",
            "31 entries of connections are in use, --max-flows is 10, which has room for 30",
        ];
        assert_eq!(text, expected);
    }
}
