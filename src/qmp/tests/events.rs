use std::fmt::Write;

use serde_json::json;

use super::*;
use crate::qmp::{Event, EventsError};

fn event(number: u32) -> String {
    format!("{{\"event\": \"E\", \"data\": {number}, \"timestamp\": {{\"seconds\": 7, \"microseconds\": 9}}}}\r\n")
}

#[tokio::test]
async fn events_come_before_and_between_replies() {
    let (monitor, mut client) = connected().await;
    let mut events = monitor.events();
    let (a, b, ()) = tokio::join!(monitor.execute(stop()), monitor.execute(stop()), async {
        let heard = [client.hear().await, client.hear().await];
        let reply = |at: usize| json!({"return": at, "id": heard[at]["id"]}).to_string() + "\r\n";
        client.say([event(0), reply(0), event(1), event(2), reply(1), event(3)].concat()).await;
    });
    assert_eq!([a.unwrap(), b.unwrap()], [json!(0), json!(1)]);
    for number in 0..4 {
        let expected = Event { name: "E".into(), data: json!(number), seconds: 7, microseconds: 9 };
        assert_eq!(events.next().await, Ok(expected));
    }
}

#[tokio::test]
async fn unknown_events_are_events() {
    let (monitor, mut client) = connected().await;
    let mut events = monitor.events();
    client.say("{\"event\": \"NEVER_HEARD_OF\", \"more\": []}\r\n").await;
    let expected = Event { name: "NEVER_HEARD_OF".into(), data: json!(null), seconds: -1, microseconds: -1 };
    assert_eq!(events.next().await, Ok(expected));
}

#[tokio::test]
async fn each_subscriber_gets_all_events_from_its_beginning_on() {
    let (monitor, mut client) = connected().await;
    let mut first = monitor.events();
    client.say(event(0)).await;
    assert_eq!(first.next().await.unwrap().data, json!(0));
    let mut second = monitor.events();
    client.say(event(1)).await;
    assert_eq!(first.next().await.unwrap().data, json!(1));
    assert_eq!(second.next().await.unwrap().data, json!(1));
}

#[tokio::test]
async fn a_flood_of_events_is_counted_for_those_who_lag() {
    const FLOOD: u32 = 100_000;
    let (monitor, mut client) = connected().await;
    let mut lagging = monitor.events();
    let (reply, ()) = tokio::join!(monitor.execute(stop()), async {
        let command = client.hear().await;
        let mut text = String::new();
        for number in 0..FLOOD {
            text.write_str(&event(number)).unwrap();
        }
        client.say(text).await;
        client.answer(&command, json!("after the flood")).await;
    });
    assert_eq!(reply.unwrap(), json!("after the flood"));
    let Err(EventsError::Lagged(missed)) = lagging.next().await else { panic!("nothing was missed") };
    let missed = u32::try_from(missed).unwrap();
    for number in missed..FLOOD {
        assert_eq!(lagging.next().await.unwrap().data, json!(number));
    }
    client.say(event(7)).await;
    assert_eq!(lagging.next().await.unwrap().data, json!(7));
}

#[tokio::test]
async fn events_end_with_the_connection_and_not_before() {
    let (monitor, mut client) = connected().await;
    let mut events = monitor.events();
    client.say(event(0)).await;
    drop(client);
    assert_eq!(events.next().await.unwrap().data, json!(0));
    assert_eq!(events.next().await, Err(EventsError::Closed));
    assert_eq!(monitor.events().next().await, Err(EventsError::Closed));
}
