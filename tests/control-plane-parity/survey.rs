//! What all clients meet at all destinations, as words that can be compared.

use std::collections::{BTreeMap, BTreeSet};

use shunt_tests::place::Place;
use shunt_tests::probe::{Ask, Met, Proto};
use shunt_tests::topology::{Cluster, Family};

use crate::client::{Client, Names};
use crate::difference::Findings;
use crate::offer::{Destination, Offer};
use crate::pair::Pair;

/// Conversations with a destination of which not all servers have answered yet. Of two servers picked at random, one is
/// missed by chance once in eight million times.
const TRIES: usize = 24;

/// One question of the survey and how it is told.
struct Question {
    client: Client,
    /// Client, service, frontend, protocol, family.
    words: [String; 5],
    is_sticky: bool,
    ask: Ask,
}

/// Asks both clusters at once and puts what they found beside each other.
#[track_caller]
pub fn survey(pair: &Pair, offers: &[Offer], places: &[Destination]) -> Findings {
    let questions = questions(pair.cluster(), offers, places);
    let found = std::thread::scope(|scope| {
        let asked = pair.worlds.each_ref().map(|world| scope.spawn(|| ask_all(&world.cluster, &questions)));
        asked.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    let [kube_proxy, shunt] = found;
    let sides = kube_proxy.into_iter().zip(shunt);
    questions.iter().zip(sides).flat_map(|(question, (one, other))| question.findings(&one, &other)).collect()
}

/// What a client met in one cluster.
struct Told {
    /// Who answered: `pod-1-1, pod-2-1`; or how it was refused.
    who: String,
    /// By server, under which address it saw the client.
    sources: BTreeMap<String, String>,
}

impl Question {
    /// Who answers, and, where servers answer on both sides, whom they take the client for.
    fn findings(&self, kube_proxy: &Told, shunt: &Told) -> Findings {
        let mut findings = vec![(self.words.clone(), (kube_proxy.who.clone(), shunt.who.clone()))];
        for (server, source) in &kube_proxy.sources {
            if let Some(other) = shunt.sources.get(server) {
                let mut words = self.words.clone();
                words[2].push_str(&format!(" to {server}"));
                findings.push((words, (source.clone(), other.clone())));
            }
        }
        findings
    }

    fn told(&self, met: &Met, names: &Names) -> Told {
        let servers: BTreeSet<_> = met.answers.iter().map(|sighting| sighting.server.clone()).collect();
        let refusals = met.failures.iter().map(|failure| refusal(failure).to_owned());
        // Of a sticky service, who it is, is chance, and with it the address by which it is reached.
        if self.is_sticky && servers.len() == 1 {
            let who = ["always the same".to_owned()].into_iter().chain(refusals);
            return Told { who: joined(who), sources: BTreeMap::new() };
        }
        let peers = met.answers.iter().filter_map(|sighting| sighting.peer).map(|peer| format!("shown as {peer}"));
        let mut sources: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for sighting in &met.answers {
            let source = names.seen_from(self.client, sighting.source);
            sources.entry(sighting.server.clone()).or_default().insert(source);
        }
        let sources = sources.into_iter().map(|(server, sources)| (server, joined(sources))).collect();
        Told { who: joined(servers.into_iter().chain(peers).chain(refusals)), sources }
    }
}

fn joined(words: impl IntoIterator<Item = String>) -> String {
    words.into_iter().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(", ")
}

fn questions(cluster: &Cluster, offers: &[Offer], places: &[Destination]) -> Vec<Question> {
    let mut questions = Vec::new();
    for client in Client::ALL {
        for offer in offers {
            for destination in offer.destinations(cluster) {
                // All who may answer; where one does not, all tries are needed to see that.
                let enough = if offer.is_sticky { 2 } else { offer.servers };
                questions.extend(question(client, offer.name, destination, enough, offer.is_sticky));
            }
        }
        for place in places {
            questions.extend(question(client, "none", place.clone(), 2, false));
        }
    }
    questions
}

fn question(client: Client, service: &str, at: Destination, enough: usize, is_sticky: bool) -> Option<Question> {
    if at.is_loopback && client != Client::Host {
        return None;
    }
    let proto = match at.proto {
        Proto::Tcp => "TCP",
        Proto::Udp => "UDP",
    };
    let family = match at.family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    };
    let words = [client.name(), service, &at.frontend, proto, family].map(str::to_owned);
    Some(Question { client, words, is_sticky, ask: Ask { to: at.to, proto: at.proto, enough, tries: TRIES } })
}

/// What each question is answered in a cluster.
fn ask_all(cluster: &Cluster, questions: &[Question]) -> Vec<Told> {
    let names = Names::of(cluster);
    std::thread::scope(|scope| {
        let of = |client: Client| -> Vec<_> { questions.iter().filter(|question| question.client == client).collect() };
        let asked = Client::ALL.map(|client| {
            let questions = of(client);
            let place = client.place(cluster);
            let names = &names;
            scope.spawn(move || {
                let mut met = place.survey(questions.iter().map(|question| question.ask.clone()).collect());
                ask_doubtful_again(&place, &questions, &mut met);
                let told = questions.iter().zip(&met).map(|(question, met)| question.told(met, names));
                told.collect::<Vec<_>>()
            })
        });
        // Questions are in the order of the clients.
        asked
            .into_iter()
            .flat_map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// Asks once more where some were answered and others met silence: a machine that is busy with all these clusters loses a
/// packet now and then, on either side, while what a proxy keeps from some it keeps from them again.
fn ask_doubtful_again(place: &Place, questions: &[&Question], met: &mut [Met]) {
    let is_doubtful =
        |met: &Met| !met.answers.is_empty() && met.failures.iter().any(|failure| refusal(failure) == "silence");
    let doubtful: Vec<_> = (0..met.len()).filter(|&number| is_doubtful(&met[number])).collect();
    if doubtful.is_empty() {
        return;
    }
    let again = place.survey(doubtful.iter().map(|&number| questions[number].ask.clone()).collect());
    for (number, again) in doubtful.into_iter().zip(again) {
        println!("asked again: {:?} met silence", questions[number].words);
        met[number] = again;
    }
}

/// How a client is refused; at which call it learns of it is the same to it.
fn refusal(failure: &str) -> &str {
    match failure.split_once(' ').map_or(failure, |(_, reason)| reason) {
        "ECONNREFUSED" => "refused",
        "timeout" | "ETIMEDOUT" => "silence",
        "EHOSTUNREACH" | "ENETUNREACH" => "unreachable",
        _ => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_by_what_it_means_to_the_client() {
        assert_eq!(refusal("connect ECONNREFUSED"), refusal("receive ECONNREFUSED"));
        assert_eq!(refusal("receive timeout"), "silence");
        assert_eq!(refusal("wrong source 192.0.2.1:80"), "wrong source 192.0.2.1:80");
    }
}
