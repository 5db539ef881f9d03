//! Checks of the kernel, of what is pinned, and of the agent.

use proxy_common::verdict::DropReason;

use super::{Facts, Outcome, list};
use crate::datapath::survey::{Seen, Unseen};

/// How programs are attached to devices.
pub(super) fn kernel_links(facts: &Facts) -> Seen<Outcome> {
    let kernel = facts.survey.kernel.as_ref()?;
    Ok(match kernel.has_tcx.as_ref()? {
        true => Outcome::ok(format!("Linux {} links programs to devices (tcx)", kernel.release)),
        false => Outcome::note(
            format!("Linux {} has no tcx: the agent uses filters (clsact), which others may pass by", kernel.release),
            "nothing; Linux 6.6 has links, which nobody takes away by mistake",
        ),
    })
}

/// The route look-up gives the source for a rewritten packet.
pub(super) fn kernel_source_address(facts: &Facts) -> Seen<Outcome> {
    match facts.survey.kernel.as_ref()?.has_source_lookup {
        Some(true) => Ok(Outcome::ok("programs can ask the kernel for the source address towards a backend")),
        Some(false) => Ok(Outcome::warning(
            "programs cannot ask the kernel for the source address towards a backend: connections from outside that \
             go on to a backend on another node are refused",
            "run Linux 6.7 or newer, or use externalTrafficPolicy Local",
        )),
        None => Err(Unseen("the kernel does not describe itself (/sys/kernel/btf/vmlinux is not there)".into())),
    }
}

/// Connections of a predecessor are recognised.
pub(super) fn kernel_functions(facts: &Facts) -> Seen<Outcome> {
    let missing = &facts.survey.kernel.as_ref()?.missing_functions;
    Ok(match missing.is_empty() {
        true => Outcome::ok("programs can ask connection tracking about connections of a predecessor"),
        false => Outcome::note(
            format!(
                "programs cannot call {}: connections of a kube-proxy that is replaced are not recognised and may \
                 break once",
                list(missing)
            ),
            "nothing, if none is replaced; else a kernel with nf_conntrack built in and BTF (CONFIG_DEBUG_INFO_BTF)",
        ),
    })
}

/// Programs are machine code.
pub(super) fn kernel_compiler(facts: &Facts) -> Seen<Outcome> {
    let interpreted = facts.survey.tables.as_ref().map(|tables| &tables.interpreted);
    let advice = "sysctl -w net.core.bpf_jit_enable=1, then start the agent anew";
    match (interpreted, facts.survey.kernel.as_ref()?.jit) {
        (Ok(slow), _) if !slow.is_empty() => {
            Ok(Outcome::warning(format!("the kernel interprets programs, which is slow: {}", list(slow)), advice))
        }
        (_, Some(0)) => Ok(Outcome::warning("the kernel interprets programs, which is slow", advice)),
        (_, Some(2)) => Ok(Outcome::warning("the kernel writes the code of each program to its log", advice)),
        (Ok(_), _) | (_, Some(_)) => Ok(Outcome::ok("programs are compiled to machine code")),
        (Err(_), None) => Err(Unseen("this network namespace does not show net.core.bpf_jit_enable".into())),
    }
}

/// Pins have a place.
pub(super) fn bpf_file_system(facts: &Facts) -> Seen<Outcome> {
    let place = &facts.survey.place;
    let base = place.base.display();
    Ok(match place.is_bpffs {
        true => Outcome::ok(format!("{base} lies on a BPF file system")),
        false => Outcome::warning(
            format!("{base} is not there, or not on a BPF file system: nothing is pinned"),
            "start the agent, which mounts one; in a container, mount the host's /sys/fs/bpf into it, or what is \
             pinned ends with the container. If the agent has another --bpffs, say it here too",
        ),
    })
}

/// Somebody follows the services.
pub(super) fn agent(facts: &Facts) -> Seen<Outcome> {
    let agent = facts.survey.agent.as_ref()?;
    let process = agent.as_ref().map(|agent| agent.process.as_ref().map(|process| process.id));
    Ok(match (process, facts.survey.place.layouts.is_empty()) {
        (Some(Some(id)), _) => Outcome::ok(format!("the agent runs as process {id}")),
        (Some(None), _) => Outcome::ok("the agent runs, in a process that cannot be seen from here"),
        (None, false) => Outcome::warning(
            "no agent runs: what is programmed works on, but changes of services are not followed",
            "start `shunt agent`, or take everything out by `shunt cleanup`",
        ),
        (None, true) => Outcome::warning("no agent runs, and nothing is programmed", "start `shunt agent`"),
    })
}

/// We look at the node that the programs serve.
pub(super) fn namespace(facts: &Facts) -> Seen<Outcome> {
    let (own, node) = (facts.survey.settings.netns.as_ref()?, facts.survey.tables.as_ref()?.config.node_netns);
    Ok(match *own == node {
        true => Outcome::ok("this is the network namespace that the agent serves"),
        false => Outcome::failure(
            "this is not the network namespace that the agent serves: what is said here of devices and settings is \
             about another one",
            "run this command where the agent runs, or by `nsenter --net=/proc/PID/ns/net` with the agent's PID",
        ),
    })
}

/// Sources are heard.
pub(super) fn sources(facts: &Facts) -> Seen<Outcome> {
    let report = facts.report.as_ref()?;
    let silent: Vec<_> = report
        .sources
        .iter()
        .flat_map(|source| source.outages.iter().map(move |outage| (source, outage)))
        .map(|(source, outage)| {
            format!("{} has no news of {} since {}: {}", source.name, outage.what, outage.since, outage.why)
        })
        .collect();
    let rejected: usize = report.sources.iter().map(|source| source.rejected.len()).sum();
    let advice = "look at `shunt status`, which says more";
    Ok(if !silent.is_empty() {
        Outcome::warning(format!("{}; what was known stays", list(silent)), advice)
    } else if !report.pending_sources.is_empty() {
        Outcome::warning(format!("not listed yet: {}", list(&report.pending_sources)), advice)
    } else if rejected > 0 {
        Outcome::warning(format!("{rejected} objects cannot be understood, and are left out"), advice)
    } else {
        Outcome::ok(format!("all listed: {}", list(report.sources.iter().map(|source| &source.name))))
    })
}

/// Services have what they ask for.
pub(super) fn services(facts: &Facts) -> Seen<Outcome> {
    let report = facts.report.as_ref()?;
    let told = |troubles: &[crate::telemetry::admin::Trouble]| {
        list(troubles.iter().map(|trouble| format!("{}: {}", trouble.subject, trouble.message)))
    };
    Ok(if !report.refused.is_empty() {
        Outcome::failure(
            format!("the kernel refuses changes: {}", told(&report.refused)),
            "they are tried again; if a table is full, give it room by --max-services, --max-backends or --max-flows",
        )
    } else if !report.problems.is_empty() {
        Outcome::warning(
            format!("services do not get what they ask for: {}", told(&report.problems)),
            "change these services; `shunt status` lists all",
        )
    } else if !report.ready {
        Outcome::warning("not everything that is known is programmed yet", "wait, and look at `shunt status`")
    } else {
        Outcome::ok("everything that is known is programmed")
    })
}

/// One layout of the tables, whole and readable.
pub(super) fn tables(facts: &Facts) -> Seen<Outcome> {
    let place = &facts.survey.place;
    let Some(last) = place.layouts.last() else {
        return Err(Unseen(format!("no tables are pinned below {}", place.base.display())));
    };
    Ok(if !place.is_readable {
        Outcome::failure(
            format!("the tables are of layout {last}, which this program cannot read"),
            "use the `shunt` of the agent's version; an agent of this version does not take their connections over",
        )
    } else if !place.missing.is_empty() {
        Outcome::failure(
            format!("somebody has removed tables of layout {last}: {}", list(&place.missing)),
            "start the agent anew; if it refuses, run `shunt cleanup` first, which ends connections",
        )
    } else if place.layouts.len() > 1 {
        Outcome::warning(
            format!("there are several layouts of the tables: {}", list(&place.layouts)),
            "if an agent is just taking over from another, wait; else start one, which ends what another has begun",
        )
    } else {
        Outcome::ok(format!("all tables of layout {last} are pinned"))
    })
}

/// No table is nearly full.
pub(super) fn table_room(facts: &Facts) -> Seen<Outcome> {
    let rooms = &facts.survey.tables.as_ref()?.rooms;
    let text =
        |room: &crate::datapath::survey::pinned::Room| format!("{} {} of {}", room.name, room.used, room.capacity);
    // A tenth is left.
    let tight: Vec<_> = rooms.iter().filter(|room| room.used * 10 >= room.capacity * 9).map(text).collect();
    let most = rooms.iter().max_by_key(|room| room.used * 1000 / room.capacity.max(1)).map(text);
    Ok(match tight.is_empty() {
        true => Outcome::ok(format!("all tables have room; the fullest: {}", most.unwrap_or_default())),
        false => Outcome::warning(
            format!("nearly full: {}", list(tight)),
            "start the agent with larger --max-services, --max-backends or --max-flows: it takes everything over",
        ),
    })
}

/// The tables fit into what the agent may take.
pub(super) fn table_memory(facts: &Facts) -> Seen<Outcome> {
    let maps = &facts.survey.tables.as_ref()?.maps;
    let (now, most): (u64, u64) = (maps.iter().map(|map| map.bytes).sum(), maps.iter().map(|map| map.most).sum());
    let largest = maps
        .iter()
        .max_by_key(|map| map.bytes)
        .map_or(String::new(), |map| format!(", most of it for {} ({})", map.name, mebibytes(map.bytes)));
    let seen = format!("tables hold {}{largest}", mebibytes(now));
    let process = facts.survey.agent.as_ref()?.as_ref().and_then(|agent| agent.process.as_ref());
    let Some(process) = process else { return Ok(Outcome::ok(seen)) };
    Ok(match process.memory_limit {
        None => Outcome::ok(format!("{seen}; the agent has no limit of memory")),
        Some(limit) if now * 10 >= limit * 9 => Outcome::failure(
            format!("{seen}, of {} that the agent and its tables may take", mebibytes(limit)),
            "raise the limit of memory, or make tables smaller by --max-services, --max-backends and --max-flows",
        ),
        Some(limit) if most > limit => Outcome::warning(
            format!(
                "{seen}, and may come to {} with all connections; the limit is {}",
                mebibytes(most),
                mebibytes(limit)
            ),
            "raise the limit of memory, or lower --max-flows",
        ),
        Some(limit) => Outcome::ok(format!("{seen}, of {} that the agent and its tables may take", mebibytes(limit))),
    })
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

/// The agent may open enough.
pub(super) fn open_files(facts: &Facts) -> Seen<Outcome> {
    /// Links of a few hundred devices, watches, listeners, and who is connected to them.
    const ENOUGH: u64 = 4096;
    let process = facts.survey.agent.as_ref()?.as_ref().and_then(|agent| agent.process.as_ref());
    let limit = process.and_then(|process| process.open_files);
    let limit = limit.ok_or_else(|| Unseen("the agent's process cannot be looked at".into()))?;
    Ok(match limit < ENOUGH {
        true => Outcome::warning(
            format!("the agent may open {limit} files: with many devices or watches it runs short"),
            "raise LimitNOFILE of its unit, or the limit of its container, to 4096 or more",
        ),
        false => Outcome::ok(format!("the agent may open {limit} files")),
    })
}

/// Drops that somebody can do something about.
pub(super) fn drops(facts: &Facts) -> Seen<Outcome> {
    let tables = facts.survey.tables.as_ref()?;
    let advised = [
        (
            DropReason::HostUnhooked,
            "processes of this node dialled services unseen by the socket hooks: see hooked-processes",
        ),
        (DropReason::SnatPortsExhausted, "give more source ports by --snat-ports"),
        (DropReason::FlowTable, "give more room by --max-flows"),
        (DropReason::NoRouteToBackend, "look for a route to the backends, and for the source address that it has"),
        (DropReason::RewriteFailed, "look at `shunt monitor` for what these packets are"),
    ];
    let counted: Vec<_> = advised
        .iter()
        .map(|(reason, what)| (tables.dropped(*reason), reason, what))
        .filter(|(count, ..)| *count > 0)
        .collect();
    Ok(match counted.is_empty() {
        true => Outcome::ok("nothing was dropped that points to a fault of this node"),
        false => Outcome::warning(
            format!(
                "dropped since the tables were made: {}",
                list(counted.iter().map(|(count, reason, _)| format!("{count} {}", reason.name())))
            ),
            list(counted.iter().map(|(.., what)| what)),
        ),
    })
}
