//! The agent's configuration file: from its text to settings.
//!
//! Two kinds of object: an `AgentConfiguration` of ours, whose fields are the agent's options, and in [`super::kube_proxy`] a
//! `KubeProxyConfiguration`. Pure.

use std::any::TypeId;
use std::path::Path;

use clap::{Arg, ArgAction};
use serde_json::{Map, Value};

use super::setting::{Place, Settings, flag, is_switch, options};
use super::{Error, kube_proxy};

/// apiVersion and kind of our own.
const OWN: (&str, &str) = ("shunt/v1alpha1", "AgentConfiguration");
/// The option by which the file itself is named.
const CONFIG: &str = "config";

/// What a file says.
#[derive(Debug, Default)]
pub struct Content {
    /// The options that it sets.
    pub settings: Settings,
    /// What is wrong with other fields of it.
    pub errors: Vec<Error>,
    /// What its reader is to be told.
    pub notes: Notes,
}

/// What is to be told of a file that can be used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// Fields with a value that means nothing here.
    pub ignored: Vec<String>,
    /// Fields that nobody knows.
    pub unknown: Vec<String>,
    /// What is done otherwise than a field says: the field, and what is done.
    pub different: Vec<(String, &'static str)>,
    /// What follows from a field, or from its absence, and is not the default of the options: the field, and what is done.
    pub implied: Vec<(String, &'static str)>,
}

impl Notes {
    /// Logs them.
    pub fn log(&self) {
        if !self.ignored.is_empty() {
            let fields = self.ignored.join(", ");
            tracing::info!(ignored = fields, "the configuration file has fields that mean nothing to this proxy");
        }
        if !self.unknown.is_empty() {
            let fields = self.unknown.join(", ");
            tracing::warn!(unknown = fields, "the configuration file has unknown fields, which are ignored");
        }
        for (field, what) in &self.different {
            tracing::warn!(field, "the configuration file asks for what is not there: {what}");
        }
        for (field, what) in &self.implied {
            tracing::info!(field, "from the configuration file: {what}");
        }
    }
}

/// Reads a file's text. Errors: it is not an object of a kind that is known.
pub fn parse(file: &Path, text: &str) -> Result<Content, Error> {
    let wrong = |message| Error { place: Place::File(file.to_owned()), message };
    let object = match parse_value(text).map_err(wrong)? {
        Value::Object(object) => object,
        Value::Null => return Err(wrong("is empty".to_owned())),
        _ => return Err(wrong("holds no object, which begins with apiVersion and kind".to_owned())),
    };
    let text = |field: &str| object.get(field).and_then(Value::as_str).unwrap_or_default();
    match (text("apiVersion"), text("kind")) {
        OWN => Ok(own(file, &object)),
        kube_proxy::KIND => Ok(kube_proxy::content(file, &object)),
        (version, kind) => Err(wrong(format!(
            "apiVersion {version:?} with kind {kind:?} is neither {} {} nor {} {}",
            OWN.0,
            OWN.1,
            kube_proxy::KIND.0,
            kube_proxy::KIND.1
        ))),
    }
}

/// JSON, or YAML with one document.
fn parse_value(text: &str) -> Result<Value, String> {
    let options = serde_saphyr::options! { strict_booleans: true, with_snippet: false };
    serde_json::from_str(text)
        .or_else(|_| serde_saphyr::from_str_with_options(text, options))
        .map_err(|error| format!("is neither JSON nor one document of YAML: {error}"))
}

fn own(file: &Path, object: &Map<String, Value>) -> Content {
    let mut content = Content::default();
    let options = options();
    for (field, value) in object.iter().filter(|(field, _)| !["apiVersion", "kind"].contains(&field.as_str())) {
        let place = Place::Field { file: file.to_owned(), field: field.clone() };
        let option = options.iter().find(|arg| field_name(&flag(arg)) == *field && flag(arg) != CONFIG);
        let values = option.ok_or_else(|| "is unknown; the fields are the options of `shunt agent`".to_owned());
        match values.and_then(|option| Ok((option, option_values(option, value)?))) {
            Ok((option, values)) if !values.is_empty() => content.settings.set(&flag(option), values, place),
            Ok(_) => {}
            Err(message) => content.errors.push(Error { place, message }),
        }
    }
    content
}

/// The field of an option: `node-name` becomes `nodeName`.
fn field_name(flag: &str) -> String {
    let mut parts = flag.split('-');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |name, part| {
        let (initial, rest) = part.split_at(part.len().min(1));
        name + &initial.to_ascii_uppercase() + rest
    })
}

fn is_number(option: &Arg) -> bool {
    option.get_value_parser().type_id() == TypeId::of::<u32>()
}

/// The values of an option as they would be typed; none if it is not set.
fn option_values(option: &Arg, value: &Value) -> Result<Vec<String>, String> {
    let is_list = matches!(option.get_action(), ArgAction::Append);
    let is_number = is_number(option);
    match value {
        Value::Null => Ok(vec![]),
        Value::Bool(set) if is_switch(option) => Ok(if *set { vec!["true".to_owned()] } else { vec![] }),
        _ if is_switch(option) => Err("true or false is needed".to_owned()),
        Value::Number(number) if is_number => Ok(vec![number.to_string()]),
        _ if is_number => Err("a number is needed".to_owned()),
        Value::String(text) => Ok(vec![text.clone()]),
        Value::Array(entries) if is_list => {
            let texts: Option<Vec<_>> = entries.iter().map(|entry| entry.as_str().map(str::to_owned)).collect();
            texts.ok_or_else(|| "a list of texts is needed".to_owned())
        }
        _ if is_list => Err("a text or a list of texts is needed".to_owned()),
        _ => Err("a text is needed".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(text: &str) -> Content {
        parse(Path::new("f"), &format!("apiVersion: shunt/v1alpha1\nkind: AgentConfiguration\n{text}")).unwrap()
    }

    fn errors(text: &str) -> Vec<String> {
        content(text).errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_option_but_the_file_has_a_field() {
        for option in options().iter().filter(|option| flag(option) != CONFIG) {
            let value = if is_switch(option) {
                "true"
            } else if is_number(option) {
                "7"
            } else {
                "'7'"
            };
            let content = content(&format!("{}: {value}", field_name(&flag(option))));
            assert!(content.errors.is_empty(), "{:?}", content.errors);
            assert!(content.settings.get(&flag(option)).is_some(), "{option}");
        }
        assert_eq!(errors("config: other.yaml").len(), 1);
    }

    #[test]
    fn values_of_all_kinds_are_read() {
        let flags = content(
            "manifests: /etc/shunt\nkubernetes: false\nnodeName: node-a\nclusterCidr: [10.0.0.0/8, 'fd00::/8']\n\
             nodeportAddresses: all\nsocketLb: off\nhostClients: off\nmaxFlows: 100\nmetricsBindAddress: ''\n\
             cgroup: null\ndevices: []\n",
        )
        .settings
        .flags()
        .unwrap();
        assert_eq!((flags.manifests, flags.kubernetes), (Some("/etc/shunt".into()), false));
        assert_eq!(flags.node_name.as_deref(), Some("node-a"));
        assert_eq!(flags.cluster_cidr, ["10.0.0.0/8", "fd00::/8"]);
        assert_eq!((flags.socket_lb, flags.max_flows), (super::super::raw::SocketLb::Off, 100));
        assert_eq!((flags.metrics_bind_address.as_str(), flags.cgroup), ("", None));
        assert!(flags.devices.is_empty());
    }

    #[test]
    fn wrong_types_and_unknown_fields_are_told_together() {
        let expected = [
            "f: clusterCidr: a list of texts is needed",
            "f: kubernetes: true or false is needed",
            "f: maxFlow: is unknown; the fields are the options of `shunt agent`",
            "f: maxFlows: a number is needed",
            "f: nodeName: a text is needed",
        ];
        let mut errors =
            errors("maxFlow: 1\nmaxFlows: many\nnodeName: 5\nkubernetes: yes\nclusterCidr: [1]\nnodeIp: null\n");
        errors.sort();
        assert_eq!(errors, expected);
    }

    #[test]
    fn values_that_no_command_line_takes_name_their_field() {
        let mut settings = content("socketLb: some\nmaxFlows: -1\nmaxServices: 100\n").settings;
        let errors: Vec<_> = settings.take_errors().iter().map(ToString::to_string).collect();
        assert_eq!(errors.len(), 2, "{errors:?}");
        assert!(errors[0].starts_with("f: maxFlows: invalid value '-1'"), "{errors:?}");
        assert!(errors[1].starts_with("f: socketLb: invalid value 'some'"), "{errors:?}");
        assert!(errors[1].ends_with("[possible values: all, host, off]"), "{errors:?}");
        assert_eq!(settings.flags().unwrap().max_services, 100);
    }

    #[test]
    fn files_that_are_something_else_are_refused() {
        let cases = [
            ("", "f: is empty"),
            ("a: [", "f: is neither JSON nor one document of YAML: "),
            ("kind: A\n---\nkind: B\n", "f: is neither JSON nor one document of YAML: "),
            ("- 1", "f: holds no object"),
            ("{}", "f: apiVersion \"\" with kind \"\" is neither shunt/v1alpha1 AgentConfiguration nor kubeproxy"),
            ("{apiVersion: v1, kind: ConfigMap}", "f: apiVersion \"v1\" with kind \"ConfigMap\" is neither "),
            ("{apiVersion: 1, kind: KubeProxyConfiguration}", "f: apiVersion \"\" with kind \"KubeProxyConf"),
        ];
        for (text, expected) in cases {
            let error = parse(Path::new("f"), text).expect_err(text).to_string();
            assert!(error.starts_with(expected), "{text:?}: {error}");
        }
    }

    #[test]
    fn json_is_read_as_well() {
        let text = "{\n\t\"apiVersion\": \"shunt/v1alpha1\", \"kind\": \"AgentConfiguration\",\n\t\"maxFlows\": 100\n}";
        let content = parse(Path::new("f"), text).unwrap();
        assert_eq!(content.settings.flags().unwrap().max_flows, 100);
    }
}
