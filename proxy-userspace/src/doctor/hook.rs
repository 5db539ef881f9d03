//! Checks of what is attached where, and of who is asked.

use proxy_common::abi::config::Config;

use super::{Facts, Outcome, list};
use crate::datapath::device::{Skip, decide_attachment};
use crate::datapath::survey::hook::DeviceHooks;
use crate::datapath::survey::{Seen, Unseen};

/// True if the agent was told to leave all sockets alone.
fn is_switched_off(facts: &Facts) -> Seen<bool> {
    Ok(facts.survey.tables.as_ref()?.config.has(Config::SOCKETS_OFF))
}

const SWITCHED_OFF: &str = "the socket hooks are switched off (--socket-lb off)";

/// All hooks are on the control group that is wanted.
pub(super) fn socket_hooks(facts: &Facts) -> Seen<Outcome> {
    if is_switched_off(facts)? {
        return Ok(Outcome::known(SWITCHED_OFF));
    }
    let sockets = facts.survey.sockets.as_ref()?;
    let detached: Vec<_> = sockets.hooks.iter().filter(|(_, group)| *group == 0).map(|(name, _)| *name).collect();
    let advice =
        "a running agent attaches them again within ten seconds; if they are gone again, look for who detaches them";
    let Some(hooked) = &sockets.hooked else {
        return Ok(Outcome::failure("no socket hook is attached: the node's own processes reach no service", advice));
    };
    let elsewhere: Vec<_> =
        sockets.hooks.iter().filter(|(_, group)| *group != 0 && *group != hooked.id).map(|(name, _)| *name).collect();
    let place = hooked
        .directory
        .as_ref()
        .map_or("a control group that is not seen here".to_owned(), |directory| directory.display().to_string());
    Ok(if !detached.is_empty() {
        Outcome::failure(format!("not attached: {}", list(detached)), advice)
    } else if !elsewhere.is_empty() {
        Outcome::failure(format!("not on {place} as the others: {}", list(elsewhere)), "start the agent anew")
    } else if hooked.id != sockets.wanted.id {
        let wanted =
            sockets.wanted.directory.as_ref().map_or(String::new(), |directory| directory.display().to_string());
        Outcome::note(
            format!("all socket hooks are on {place}, not on {wanted}"),
            "right if the agent was told so by --cgroup (say it here too); else processes elsewhere are not served",
        )
    } else {
        Outcome::ok(format!("all {} socket hooks are on {place}", sockets.hooks.len()))
    })
}

/// The hooks are asked about a socket of this process.
pub(super) fn socket_hooks_fire(facts: &Facts) -> Seen<Outcome> {
    if is_switched_off(facts)? {
        return Ok(Outcome::known(SWITCHED_OFF));
    }
    let dialled = facts.survey.dialled.as_ref()?;
    let is_outside =
        facts.survey.outside.as_ref().is_ok_and(|all| all.iter().any(|process| process.id == std::process::id()));
    let unasked: Vec<_> =
        dialled.iter().filter(|dialled| !dialled.is_refused).map(|dialled| dialled.at.to_string()).collect();
    let families = list(dialled.iter().map(|dialled| dialled.at.ip().to_string()));
    Ok(match (unasked.is_empty(), is_outside) {
        (true, _) => Outcome::ok(format!("the socket hooks answered when this process dialled {families}")),
        (false, true) => Outcome::note(
            format!(
                "the socket hooks did not answer when this process dialled {}: it is outside the hooked group",
                list(unasked)
            ),
            "run this command from a process that is hooked, to see them work",
        ),
        (false, false) => Outcome::failure(
            format!("the socket hooks did not answer when this process dialled {}", list(unasked)),
            "see socket-hooks and hooked-processes; programs of others at the same hooks may decide before ours",
        ),
    })
}

/// Nobody is outside the hooked control group who needs the hooks.
pub(super) fn hooked_processes(facts: &Facts) -> Seen<Outcome> {
    if is_switched_off(facts)? {
        return Ok(Outcome::known(SWITCHED_OFF));
    }
    let outside = facts.survey.outside.as_ref()?;
    let own = std::process::id();
    let of_node: Vec<_> = outside.iter().filter(|process| process.is_of_node && process.id != own).collect();
    let others = outside.iter().filter(|process| !process.is_of_node).count();
    let names = list(of_node.iter().map(|process| format!("{} ({})", process.name, process.id)));
    Ok(if !of_node.is_empty() {
        Outcome::warning(
            format!(
                "{} processes of this network namespace are outside the hooked control group and reach no service: {names}",
                of_node.len()
            ),
            "start the agent with --cgroup at the root of cgroup2, as the host mounts it, or move these processes below the hooked group",
        )
    } else if others > 0 {
        Outcome::known(format!(
            "{others} processes of other network namespaces are outside the hooked control group: if they are pods, their packets are served instead"
        ))
    } else {
        Outcome::ok("all processes are below the hooked control group")
    })
}

/// Who else decides about sockets.
pub(super) fn other_socket_programs(facts: &Facts) -> Seen<Outcome> {
    let others = &facts.survey.sockets.as_ref()?.others;
    Ok(match others.is_empty() {
        true => Outcome::ok("no other program is asked about the sockets that ours are asked about"),
        false => Outcome::note(
            format!("asked about the same sockets: {}", list(others.iter().map(|program| &program.name))),
            "make sure that they do not translate services too; all of them run",
        ),
    })
}

fn served(facts: &Facts) -> Seen<impl Iterator<Item = &DeviceHooks>> {
    let choice = facts.choice();
    let devices = facts.survey.devices.as_ref()?;
    Ok(devices.iter().filter(move |hooks| decide_attachment(&hooks.device, &choice).is_ok()))
}

/// Devices that run our programs.
pub(super) fn attached(facts: &Facts) -> Seen<impl Iterator<Item = &DeviceHooks>> {
    facts.survey.tables.as_ref()?;
    let devices = facts.survey.devices.as_ref()?;
    Ok(devices.iter().filter(|hooks| hooks.ingress.ours.is_some() || hooks.egress.ours.is_some()))
}

/// Every device that should run our programs does.
pub(super) fn device_hooks(facts: &Facts) -> Seen<Outcome> {
    facts.survey.tables.as_ref()?;
    let (mut whole, mut lacking) = (Vec::new(), Vec::new());
    for hooks in served(facts)? {
        let name = &hooks.device.name;
        match (hooks.ingress.ours, hooks.egress.ours) {
            (Some(_), Some(_)) => whole.push(name.clone()),
            (None, Some(_)) => lacking.push(format!("{name} (for what comes in)")),
            (Some(_), None) => lacking.push(format!("{name} (for what goes out)")),
            (None, None) => lacking.push(name.clone()),
        }
    }
    let choice = facts.choice();
    let left_out =
        facts.survey.devices.as_ref()?.iter().filter_map(|hooks| match decide_attachment(&hooks.device, &choice) {
            Err(Skip::Excluded | Skip::NotChosen) => Some(&hooks.device.name),
            _ => None,
        });
    let left_out: Vec<_> = left_out.collect();
    let unless = if facts.report.is_err() { " (or were left out by --devices or --exclude-devices)" } else { "" };
    Ok(if !lacking.is_empty() {
        Outcome::failure(
            format!("programs are missing{unless}: {}", list(lacking)),
            "a running agent attaches them again within ten seconds; its log says why it cannot",
        )
    } else if !left_out.is_empty() {
        Outcome::known(format!(
            "left out by --devices or --exclude-devices: {}; attached to {}",
            list(left_out),
            list(whole)
        ))
    } else {
        Outcome::ok(format!("programs are attached to {}", list(whole)))
    })
}

/// Ours come first on the way in and last on the way out.
pub(super) fn device_order(facts: &Facts) -> Seen<Outcome> {
    let mut wrong = Vec::new();
    for hooks in attached(facts)? {
        let device = &hooks.device.name;
        let (first, last) = (hooks.ingress.programs.first(), hooks.egress.programs.last());
        if let (Some(first), Some(_)) = (first.filter(|first| Some(first.id) != hooks.ingress.ours), hooks.ingress.ours)
        {
            wrong.push(format!("{} comes before ours on the way in at {device}", first.name));
        }
        if let (Some(last), Some(_)) = (last.filter(|last| Some(last.id) != hooks.egress.ours), hooks.egress.ours) {
            wrong.push(format!("{} comes after ours on the way out at {device}", last.name));
        }
    }
    Ok(match wrong.is_empty() {
        true => Outcome::ok("on every device, our programs come first on the way in and last on the way out"),
        false => Outcome::warning(
            list(wrong),
            "these programs see packets untranslated; attach them after ours on the way in and before ours on the way \
             out, or detach and attach ours by starting the agent anew after `shunt cleanup`",
        ),
    })
}

/// Who else looks at packets.
pub(super) fn other_device_programs(facts: &Facts) -> Seen<Outcome> {
    let devices = facts.survey.devices.as_ref()?;
    if devices.is_empty() {
        return Err(Unseen("there is no device".into()));
    }
    let mut others = Vec::new();
    for hooks in devices {
        let device = &hooks.device.name;
        others.extend(hooks.foreign_xdp.iter().map(|program| format!("{} at XDP of {device}", program.name)));
        others.extend(hooks.filters.iter().map(|name| format!("{name} as filter of {device}")));
        let sides = [(&hooks.ingress, "in"), (&hooks.egress, "out")];
        let tcx = sides.iter().flat_map(|(hook, way)| {
            let foreign = hook.programs.iter().filter(|program| Some(program.id) != hook.ours);
            foreign.map(move |program| format!("{} on the way {way} at {device}", program.name))
        });
        others.extend(tcx);
    }
    Ok(match others.is_empty() {
        true => Outcome::ok("no other program looks at the packets of these devices"),
        false => Outcome::note(
            format!("other programs look at packets: {}", list(others)),
            "XDP sees packets before ours, filters (`tc filter`) after ours in both directions; make sure that they do \
             not translate services too",
        ),
    })
}
