//! What is set, where, and by which text, before anybody asks what it means: options of the command line, fields of a file.
//!
//! A file is read as options of the command line that stand before those which were typed. So both know the same options,
//! with the same values and the same complaints. Pure.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::Error;
use super::raw::AgentFlags;

/// Options that are one choice: who types one of them leaves nothing of the other.
const RIVALS: [&str; 2] = ["kubernetes", "kubeconfig"];

/// Where something is set, as whoever wrote it finds it again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// An option, without its dashes.
    Flag(String),
    /// A file as a whole.
    File(PathBuf),
    /// A field of a file.
    Field {
        /// The file.
        file: PathBuf,
        /// The field, with those that it lies in: `conntrack.min`.
        field: String,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => write!(f, "--{flag}"),
            Self::File(file) => write!(f, "{}", file.display()),
            Self::Field { file, field } => write!(f, "{}: {field}", file.display()),
        }
    }
}

/// The values of an option, and where they come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// As they would be typed; one for an option without a value, `true`.
    pub values: Vec<OsString>,
    /// Where they come from.
    pub place: Place,
}

/// Options that are set, by name without dashes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings(BTreeMap<String, Setting>);

impl Settings {
    /// What was typed on the command line; defaults are left out.
    fn of_command_line(matches: &ArgMatches) -> Self {
        let is_typed = |arg: &Arg| matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
        let setting = |arg: Arg| {
            let values = matches.get_raw(arg.get_id().as_str()).into_iter().flatten().map(OsString::from).collect();
            let flag = flag(&arg);
            (flag.clone(), Setting { values, place: Place::Flag(flag) })
        };
        Self(options().into_iter().filter(is_typed).map(setting).collect())
    }

    /// Sets an option.
    pub fn set(&mut self, flag: &str, values: impl IntoIterator<Item = impl Into<OsString>>, place: Place) {
        let values = values.into_iter().map(Into::into).collect();
        self.0.insert(flag.to_owned(), Setting { values, place });
    }

    /// An option that is set.
    pub fn get(&self, flag: &str) -> Option<&Setting> {
        self.0.get(flag)
    }

    /// These, but for what `winner` sets otherwise, and all of `winner`.
    pub fn overridden_by(mut self, winner: Self) -> Self {
        if RIVALS.iter().any(|flag| winner.0.contains_key(*flag)) {
            self.0.retain(|flag, _| !RIVALS.contains(&flag.as_str()));
        }
        self.0.extend(winner.0);
        self
    }

    /// Takes out every option whose values no command line could have, and says why.
    pub fn take_errors(&mut self) -> Vec<Error> {
        let refused = self.0.extract_if(.., |flag, setting| read(words(flag, setting)).is_err());
        let error = |(flag, setting): (String, Setting)| {
            let error = read(words(&flag, &setting)).expect_err("it was refused a moment ago");
            Error { place: setting.place, message: in_short(&error) }
        };
        refused.map(error).collect()
    }

    /// The flags as if all had been typed. Errors: one of them could not have been.
    pub fn flags(&self) -> Result<AgentFlags, clap::Error> {
        read(self.0.iter().flat_map(|(flag, setting)| words(flag, setting)))
    }
}

fn read(words: impl IntoIterator<Item = OsString>) -> Result<AgentFlags, clap::Error> {
    let command = AgentFlags::augment_args(Command::new("agent").no_binary_name(true));
    AgentFlags::from_arg_matches(&command.try_get_matches_from(words)?)
}

/// The words that set an option.
fn words(flag: &str, setting: &Setting) -> Vec<OsString> {
    let word = |value: &OsString| {
        let mut word = OsString::from(format!("--{flag}="));
        word.push(value);
        word
    };
    match options().iter().find(|arg| arg.get_long() == Some(flag)) {
        Some(arg) if is_switch(arg) => vec![format!("--{flag}").into()],
        _ => setting.values.iter().map(word).collect(),
    }
}

/// What an error of the command line says first; usage and hints of where to look are left out.
fn in_short(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    lines.join(" ").trim_start_matches("error: ").to_owned()
}

/// All options of the agent.
pub fn options() -> Vec<Arg> {
    AgentFlags::augment_args(Command::new("agent")).get_arguments().cloned().collect()
}

/// The name of an option, without its dashes.
pub fn flag(arg: &Arg) -> String {
    arg.get_long().expect("every option of the agent has a long name").to_owned()
}

/// True of an option that takes no value.
pub fn is_switch(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::SetTrue)
}

/// The command line of the agent: what it means, and what of it was typed.
#[derive(Clone, Debug)]
pub struct AgentArgs {
    /// All options, with defaults.
    pub flags: AgentFlags,
    /// Those that were typed.
    pub typed: Settings,
}

impl FromArgMatches for AgentArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let typed = Settings::of_command_line(matches);
        Ok(Self { flags: AgentFlags::from_arg_matches(matches)?, typed })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for AgentArgs {
    fn augment_args(command: Command) -> Command {
        AgentFlags::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        AgentFlags::augment_args_for_update(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(words: &str) -> Settings {
        let command = AgentArgs::augment_args(Command::new("agent").no_binary_name(true));
        let matches = command.try_get_matches_from(words.split_whitespace()).unwrap();
        AgentArgs::from_arg_matches(&matches).unwrap().typed
    }

    #[test]
    fn what_was_typed_is_read_again_as_the_same() {
        let words = "--kubernetes --api-server a --cluster-cidr 10.0.0.0/8,fd00::/8 --cluster-cidr 192.0.2.0/24 \
                     --metrics-bind-address= --max-flows 100 --socket-lb host";
        let settings = typed(words);
        assert_eq!(settings.0.len(), 6);
        let flags = settings.flags().unwrap();
        assert!(flags.kubernetes);
        assert_eq!(flags.cluster_cidr, ["10.0.0.0/8", "fd00::/8", "192.0.2.0/24"]);
        assert_eq!((flags.metrics_bind_address.as_str(), flags.max_flows), ("", 100));
        let command = AgentFlags::augment_args(Command::new("agent").no_binary_name(true));
        let matches = command.try_get_matches_from(words.split_whitespace()).unwrap();
        assert_eq!(format!("{flags:?}"), format!("{:?}", AgentFlags::from_arg_matches(&matches).unwrap()));
    }

    #[test]
    fn what_is_typed_wins_option_by_option() {
        let lower = typed("--max-flows 100 --cluster-cidr 10.0.0.0/8 --kubeconfig k");
        let flags = lower.clone().overridden_by(typed("--cluster-cidr fd00::/8 --manifests m")).flags().unwrap();
        assert_eq!((flags.max_flows, flags.cluster_cidr), (100, vec!["fd00::/8".to_owned()]));
        assert_eq!((flags.kubeconfig, flags.manifests), (Some("k".into()), Some("m".into())));
        let flags = lower.overridden_by(typed("--kubernetes")).flags().unwrap();
        assert!(flags.kubernetes && flags.kubeconfig.is_none());
    }

    #[test]
    fn an_explicit_default_is_typed() {
        let flags = typed("--snat-ports 20000-29999").overridden_by(typed("--snat-ports 10000-29999")).flags().unwrap();
        assert_eq!(flags.snat_ports, "10000-29999");
    }
}
