//! Endpoints that come and go: connections keep theirs as long as it makes sense, new ones get those that there are.

use shunt_tests::packet::flag;
use shunt_tests::topology::Family;

use crate::lab::{Lab, Proto, each, tcp};
use crate::world::{self, Name};

#[test]
fn open_tcp_connections_keep_a_backend_that_is_gone() {
    let mut lab = Lab::new();
    for family in Family::ALL {
        for (port, name) in (4000..).zip([Name::Local, Name::Remote]) {
            lab.converse(Proto::Tcp, world::outside(1).port(family, port), name.vip().port(family, world::PORT));
        }
    }
    let all =
        Family::ALL.map(|family| [world::pod(1), world::remote_pod(1)].map(|pod| pod.port(family, world::TARGET)));
    lab.retire(all.as_flattened());
    for family in Family::ALL {
        for (port, name) in (4000..).zip([Name::Local, Name::Remote]) {
            let (client, frontend) = (world::outside(1).port(family, port), name.vip().port(family, world::PORT));
            let more = lab.confirming(Proto::Tcp, client, frontend);
            let seen = lab.through(&more).expect("it drains");
            let reply = lab.following(Proto::Tcp, seen.dst(), seen.src());
            assert_eq!(lab.through(&reply).map(|packet| packet.src()), Some(frontend));
        }
    }
}

#[test]
fn a_gone_backend_gets_no_new_tcp_connection_and_no_datagram() {
    let mut lab = Lab::new();
    let ports = 4000..4040;
    each(|family, proto| {
        for port in ports.clone() {
            lab.converse(proto, world::outside(1).port(family, port), Name::Mixed.vip().port(family, world::PORT));
        }
    });
    let gone =
        Family::ALL.map(|family| [world::pod(1), world::remote_pod(2)].map(|pod| pod.port(family, world::TARGET)));
    lab.retire(gone.as_flattened());
    each(|family, proto| {
        for port in ports.clone() {
            let (client, frontend) =
                (world::outside(1).port(family, port), Name::Mixed.vip().port(family, world::PORT));
            // A SYN of an open connection is of a new one if the old one's backend is gone.
            let seen = lab.open(proto, client, frontend);
            assert!(!gone.as_flattened().contains(&seen.dst()), "{} is gone", seen.dst());
        }
    });
}

#[test]
fn connections_to_backends_that_stay_stay() {
    let mut lab = Lab::new();
    let mut first = Vec::new();
    each(|family, proto| {
        for port in 4000..4040 {
            let (client, frontend) =
                (world::outside(1).port(family, port), Name::Mixed.vip().port(family, world::PORT));
            first.push((proto, client, frontend, lab.converse(proto, client, frontend)));
        }
    });
    let gone = Family::ALL.map(|family| world::pod(1).port(family, world::TARGET));
    lab.retire(&gone);
    for (proto, client, frontend, seen) in first.iter().filter(|(.., seen)| !gone.contains(&seen.dst())) {
        let more = lab.confirming(*proto, *client, *frontend);
        assert_eq!(lab.through(&more).map(|packet| packet.dst()), Some(seen.dst()));
    }
}

#[test]
fn a_service_that_lost_all_its_backends_refuses_what_is_new() {
    let mut lab = Lab::new();
    let all =
        Family::ALL.map(|family| [world::pod(1), world::remote_pod(1)].map(|pod| pod.port(family, world::TARGET)));
    lab.retire(all.as_flattened());
    each(|family, proto| {
        for name in [Name::Local, Name::Remote] {
            let opening =
                lab.opening(proto, world::outside(1).port(family, 4000), name.vip().port(family, world::PORT));
            assert_eq!(lab.through(&opening), None);
        }
    });
    assert_eq!(lab.drops["no_endpoint"], 8);
}

#[test]
fn forged_resets_and_beginnings_end_no_connection() {
    let mut lab = Lab::new();
    for family in Family::ALL {
        for (client, name) in
            [(world::outside(1), Name::Local), (world::outside(1), Name::Remote), (world::pod(2), Name::Mixed)]
        {
            let (client, frontend) = (client.port(family, 4000), name.cluster_ip().port(family, world::PORT));
            let seen = lab.converse(Proto::Tcp, client, frontend);
            for flags in [flag::RST, flag::SYN] {
                let mut forged = lab.opening(Proto::Tcp, client, frontend);
                tcp(&mut forged).flags = flags;
                tcp(&mut forged).seq = 0xdead_beef;
                let at_backend = lab.through(&forged).map(|packet| (packet.src(), packet.dst()));
                assert_eq!(at_backend, Some((seen.src(), seen.dst())), "the backend judges it");
            }
            // Its challenge goes to the client, and the connection goes on.
            let mut challenge = lab.following(Proto::Tcp, seen.dst(), seen.src());
            tcp(&mut challenge).flags = flag::ACK;
            let at_client = lab.through(&challenge).map(|packet| (packet.src(), packet.dst()));
            assert_eq!(at_client, Some((frontend, client)));
            let more = lab.confirming(Proto::Tcp, client, frontend);
            assert_eq!(lab.through(&more).map(|packet| packet.src()), Some(seen.src()));
        }
    }
}
