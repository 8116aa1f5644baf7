//! What a node tells of itself: its events, the connections of hosts, its log levels, its metrics.

use std::time::Duration;

use tokio::time;
use weft_api::Client;
use weft_api::ClientError;
use weft_api::Connection;
use weft_api::Event;
use weft_api::LogLevel;
use weft_api::format_rfc3339;

use super::ConnectionCommand;
use super::EventCommand;
use super::Format;
use super::LogArguments;
use super::OutputArguments;
use super::admin::ask;
use super::exit::Failure;
use super::output::Table;
use super::output::json_line;
use super::output::print;
use super::output::print_while_read;
use super::output::show;
use super::output::yaml;
use crate::units::format_size;

/// How often `weft event list --follow` asks for more.
const FOLLOW_INTERVAL: Duration = Duration::from_secs(1);

/// Runs `weft event`.
pub(super) fn event(command: EventCommand, node: Client) -> Result<(), Failure> {
    let EventCommand::List { after, follow, output } = command;
    if follow {
        return ask(node, async |client| Ok(self::follow(&client, after, &output).await))?;
    }
    let events = ask(node, async |client| client.events(after).await)?;
    show(&output, &events, |events| event_table(events))
}

/// Runs `weft connection`.
pub(super) fn connection(command: ConnectionCommand, node: Client) -> Result<(), Failure> {
    let ConnectionCommand::List(output) = command;
    let connections = ask(node, async |client| client.connections().await)?;
    show(&output, &connections, |connections| connection_table(connections))
}

/// Runs `weft log`.
pub(super) fn log(arguments: LogArguments, node: Client) -> Result<(), Failure> {
    let LogArguments { level, output } = arguments;
    let level = ask(node, async |client| match level {
        Some(level) => client.set_log_level(&LogLevel { level }).await,
        None => client.log_level().await,
    })?;
    show(&output, &level, |log| format!("{}\n", log.level))
}

/// Runs `weft metrics`.
pub(super) fn metrics(node: Client) -> Result<(), Failure> {
    print(&ask(node, async |client| client.metrics().await)?)
}

/// Prints events as they come, until nobody reads them. A node that goes away is waited for: its
/// next start is what one wants to see.
///
/// # Errors
/// The node does not answer the first time, or refuses.
async fn follow(client: &Client, mut after: u64, output: &OutputArguments) -> Result<(), Failure> {
    let mut epoch = client.pod().await?.epoch;
    if output.output == Format::Table && !print_while_read(&following(EVENT_HEADER))? {
        return Ok(());
    }
    loop {
        match news(client, &mut epoch, &mut after).await {
            Ok(events) => {
                for event in &events {
                    if !print_while_read(&one(event, output))? {
                        return Ok(());
                    }
                }
            }
            Err(ClientError::Unreachable { .. } | ClientError::Broken(_)) => {}
            Err(error) => return Err(error.into()),
        }
        time::sleep(FOLLOW_INTERVAL).await;
    }
}

/// The events since the last call. A node that was started again counts from 1 again.
async fn news(
    client: &Client,
    epoch: &mut u64,
    after: &mut u64,
) -> Result<Vec<Event>, ClientError> {
    let present = client.pod().await?.epoch;
    if present != *epoch {
        (*epoch, *after) = (present, 0);
    }
    let events = client.events(*after).await?;
    if let Some(last) = events.last() {
        *after = last.sequence;
    }
    Ok(events)
}

/// One event of a stream: a line, an object a line, or a document of its own.
fn one(event: &Event, output: &OutputArguments) -> String {
    match output.output {
        Format::Table => {
            let cells = cells(event);
            following(cells.each_ref().map(String::as_str))
        }
        Format::Json => json_line(event),
        Format::Yaml => format!("---\n{}", yaml(event)),
    }
}

/// Columns of a list of events.
const EVENT_HEADER: [&str; 7] =
    ["TIME", "SEVERITY", "KIND", "COUNT", "SUBJECT", "MESSAGE", "ADVICE"];

fn event_table(events: &[Event]) -> String {
    let mut table = Table::new(&EVENT_HEADER, &[3]);
    for event in events {
        table.row(cells(event).into());
    }
    table.text()
}

fn cells(event: &Event) -> [String; 7] {
    [
        format_rfc3339(event.unix_ms),
        event.severity.name().to_owned(),
        event.kind.clone(),
        event.count.to_string(),
        event.subject.clone(),
        event.message.clone(),
        event.advice.clone(),
    ]
}

/// A line of a stream, whose later lines are not known: columns are as wide as they usually are.
fn following([time, severity, kind, count, subject, message, advice]: [&str; 7]) -> String {
    let line = format!(
        "{time:<24}  {severity:<8}  {kind:<21}  {count:>5}  {subject:<16}  {message}  {advice}"
    );
    format!("{}\n", line.trim_end())
}

fn connection_table(connections: &[Connection]) -> String {
    let header = [
        "ID",
        "PROTOCOL",
        "PEER",
        "TLS",
        "OPEN",
        "IN FLIGHT",
        "REQUESTS",
        "ERRORS",
        "READ",
        "WRITTEN",
        "QUEUE",
        "VOLUME",
        "HOST",
    ];
    let mut table = Table::new(&header, &[0, 4, 5, 6, 7, 8, 9]);
    for connection in connections {
        let queue = match (connection.controller, connection.queue) {
            (Some(controller), Some(queue)) => format!("{controller}:{queue}"),
            _ => String::new(),
        };
        table.row(vec![
            connection.id.to_string(),
            connection.front_end.to_string(),
            connection.peer.clone(),
            if connection.tls { "yes" } else { "no" }.to_owned(),
            format!("{} s", connection.open_s),
            connection.in_flight.to_string(),
            connection.requests.to_string(),
            connection.errors.to_string(),
            format_size(connection.bytes_read),
            format_size(connection.bytes_written),
            queue,
            connection.volume.clone().unwrap_or_default(),
            connection.host.clone().unwrap_or_default(),
        ]);
    }
    table.text()
}

#[cfg(test)]
mod tests {
    use weft_api::Severity;

    use super::*;

    #[test]
    fn an_event_is_a_line_with_all_it_says() {
        let event = Event {
            sequence: 3,
            unix_ms: 1_000_000_000_123,
            severity: Severity::Warning,
            kind: "device-full".to_owned(),
            subject: "dev-1.img".to_owned(),
            message: "no room".to_owned(),
            advice: "make room".to_owned(),
            count: 2,
        };
        let line = |format| one(&event, &OutputArguments { output: format });
        let words: Vec<_> = line(Format::Table).split_whitespace().map(str::to_owned).collect();
        let expected = "2001-09-09T01:46:40.123Z warning device-full 2 dev-1.img no room make room";
        assert_eq!(words.join(" "), expected);
        assert_eq!(line(Format::Json).lines().count(), 1);
        assert!(line(Format::Yaml).starts_with("---\nsequence: 3\n"), "{}", line(Format::Yaml));
        let listed = event_table(std::slice::from_ref(&event));
        assert!(listed.starts_with("TIME ") && listed.ends_with("make room\n"), "{listed}");
    }
}
