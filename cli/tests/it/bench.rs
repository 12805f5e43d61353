//! `bench`: what it prints, what it writes, and how it talks to peers.

use serde_json::Value;

use crate::common::{Done, Folder, program};

/// A small layer, and whatever else is asked for.
fn bench(folder: &Folder, more: &[&str]) -> (Done, Value) {
    let output = folder.path("out");
    let output = output.to_str().unwrap();
    let small = ["bench", "--model", "olmoe-1b-7b", "--shrink", "64", "--output", output];
    let done = program(&[&small, more].concat());
    let text = std::fs::read_to_string(folder.path("out/bench.json")).unwrap_or_default();
    (done, serde_json::from_str(&text).unwrap_or_default())
}

fn rows(record: &Value) -> &[Value] {
    record["rows"].as_array().map_or(&[], Vec::as_slice)
}

#[test]
fn the_cpu_gets_a_table_and_a_record() {
    let folder = Folder::new();
    let more = ["--device", "cpu", "--tokens", "8,1", "--routing", "uniform,hot"];
    let (done, record) = bench(&folder, &more);
    assert_eq!(done.status, Some(0), "{done:?}");
    assert!(done.stdout.contains("ceilings of this run: copy"), "{}", done.stdout);
    assert_eq!(record["complete"], true);
    assert_eq!(record["device"]["kind"], "cpu");
    assert!(record["ceilings"]["dense_flops_per_second"].as_f64().unwrap() > 0.0);
    // Fifteen operations, two numbers of tokens, two routings; with the gate there is no hot expert.
    assert_eq!(rows(&record).len(), 58);
    for row in rows(&record) {
        let at = |key: &str| row["seconds"][key].as_f64().unwrap();
        assert!(0.0 < at("p10") && at("p10") <= at("median") && at("median") <= at("p90"), "{row}");
        let percent = row["percent_of_roofline"].as_f64().unwrap();
        let by_hand = 100.0 * row["roofline_seconds"].as_f64().unwrap() / at("median");
        assert!((percent / by_hand - 1.0).abs() < 1e-9, "{row}");
        assert_eq!(
            (&row["model"], &row["by"]),
            (&"olmoe-1b-7b-div64".into(), &"moe-kernels".into())
        );
        let name = row["op"].as_str().unwrap();
        assert!(done.stdout.contains(name), "{name} is not in the table");
    }
    let layer =
        rows(&record).iter().find(|row| row["op"] == "layer" && row["tokens"] == 8).unwrap();
    assert_eq!(layer["boundary"], "layer from logits");
    assert_eq!((layer["hidden"].as_u64(), layer["intermediate"].as_u64()), (Some(32), Some(16)));
    // 6 T K H I
    assert_eq!(layer["flops"].as_u64(), Some(6 * 8 * 8 * 32 * 16));
}

#[cfg(feature = "plots")]
#[test]
fn pictures_are_drawn() {
    let folder = Folder::new();
    let (done, _) = bench(&folder, &["--device", "cpu", "--tokens", "1,8", "--op", "layer,route"]);
    assert_eq!(done.status, Some(0), "{done:?}");
    for name in ["time-olmoe-1b-7b-div64", "operations-olmoe-1b-7b-div64", "roofline"] {
        let png = std::fs::read(folder.path(&format!("out/{name}.png"))).unwrap();
        assert!(png.starts_with(b"\x89PNG") && png.len() > 10_000, "{name}: {} bytes", png.len());
        let svg = std::fs::read_to_string(folder.path(&format!("out/{name}.svg"))).unwrap();
        assert!(svg.contains("olmoe-1b-7b-div64"), "{name}.svg does not say what it shows");
    }
}

#[cfg(feature = "emulator")]
#[test]
fn the_emulator_counts_instead_of_timing() {
    let folder = Folder::new();
    let more = ["--device", "emulator", "--tokens", "8", "--op", "permute,layer", "--dtype", "f16"];
    let (done, record) = bench(&folder, &more);
    assert_eq!(done.status, Some(0), "{done:?}");
    assert!(done.stdout.contains("Nothing was timed"), "{}", done.stdout);
    let [permute, layer] = rows(&record) else { panic!("{record}") };
    assert!(permute["seconds"].is_null() && permute["percent_of_roofline"].is_null(), "{permute}");
    let kernels = permute["traffic"].as_array().unwrap();
    assert_eq!(kernels.len(), 1, "{permute}");
    assert_eq!(kernels[0]["kernel"], "moe_permute_fwd_f16");
    // Rows of 64 bytes: 8 are read and 64 written, beside the map.
    let moved = kernels[0]["dram_bytes"].as_u64().unwrap();
    assert!((72 * 64..72 * 64 + 1024).contains(&moved), "{moved}");
    assert!(layer["traffic"].as_array().unwrap().len() >= 5, "{layer}");
}

#[test]
fn nothing_starts_after_the_time_limit() {
    let folder = Folder::new();
    let (done, record) = bench(&folder, &["--device", "cpu", "--tokens", "1", "--time-limit", "0"]);
    assert_eq!(done.status, Some(0), "{done:?}");
    assert!(done.stdout.contains("time limit was reached"), "{}", done.stdout);
    assert_eq!((record["complete"].as_bool(), rows(&record).len()), (Some(false), 0));
}

#[test]
fn what_cannot_be_measured_is_refused_first() {
    let folder = Folder::new();
    for (arguments, words) in [
        (["--model", "gpt-5"], "known are mixtral-8x7b,"),
        (["--op", "softmax"], "known are router_gemm, route, noise,"),
        (["--tokens", "0"], "0 is not in 1..="),
        (["--routing", "left"], "possible values"),
        (["--dtype", "f64"], "wanted f32, f16 or bf16"),
        (["--output", "/dev/null/out"], "cannot create /dev/null/out"),
    ] {
        let done = program(&[&["bench", "--device", "cpu"], &arguments[..]].concat());
        assert_eq!(done.status, Some(2), "{done:?}");
        assert!(done.stderr.contains(words), "no '{words}' in: {}", done.stderr);
    }
    assert!(folder.names().is_empty());
}

/// What a peer says of our output.
const GOOD: &str = r#"{"relative_error":1e-7}"#;

/// A peer in a few lines of shell, which answers what it is told to and notes what it was asked.
fn peer(folder: &Folder, ours: &str, check: &str, time: &str) -> String {
    let script = format!(
        r#"
while [ $# -gt 0 ]; do last=$1; shift; done
[ -s "$last" ] && echo "$last" > {inputs}
echo '{{"peers":[{{"name":"shell","version":"1","boundaries":["layer from logits","GEMM alone"]}}],
"unavailable":[{{"name":"absent","why":"there is none"}}],"checks":["moe-kernels"]}}' | tr -d '\n'
echo
while read -r line; do
  echo "$line" >> {asked}
  case $line in
    *moe-kernels*) echo '{ours}' ;;
    *check*) echo '{check}' ;;
    *) echo '{time}' ;;
  esac
done
"#,
        asked = folder.path("asked").display(),
        inputs = folder.path("inputs").display(),
    );
    std::fs::write(folder.path("peer.sh"), script).unwrap();
    format!("sh {}", folder.path("peer.sh").display())
}

/// One layer beside a peer.
fn beside(folder: &Folder, peer: &str) -> (Done, Value) {
    let layer = ["--device", "cpu", "--tokens", "2", "--op", "layer", "--no-ceilings"];
    bench(folder, &[&layer[..], &["--peers", peer]].concat())
}

#[test]
fn peers_are_checked_and_timed_between_ours() {
    let folder = Folder::new();
    let time = r#"{"seconds":[0.3,0.1,0.2],"launch":"eager","cache":"warm","note":null}"#;
    let peer = peer(&folder, GOOD, r#"{"relative_error":0.001}"#, time);
    let (done, record) = beside(&folder, &peer);
    assert_eq!(done.status, Some(0), "{done:?}");
    let [ours, absent, shell] = rows(&record) else { panic!("{record}") };
    assert_eq!(
        (ours["by"].as_str(), ours["relative_error"].as_f64()),
        (Some("moe-kernels"), Some(1e-7))
    );
    // The ceilings were left out, and the roofline that follows from them.
    assert!(record["ceilings"]["copy_bytes_per_second"].is_null(), "{record}");
    assert!(ours["roofline_seconds"].is_null() && ours["seconds"]["median"].is_f64(), "{ours}");
    assert_eq!(
        (absent["by"].as_str(), absent["note"].as_str()),
        (Some("absent"), Some("there is none"))
    );
    assert_eq!(
        (shell["by"].as_str(), shell["seconds"]["median"].as_f64()),
        (Some("shell"), Some(0.2))
    );
    assert_eq!(shell["launch"], "eager");
    assert!(
        shell["ours_around"].as_array().unwrap().iter().all(|ours| ours.as_f64().unwrap() > 0.0)
    );
    let asked = std::fs::read_to_string(folder.path("asked")).unwrap();
    let asked: Vec<Value> = asked.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(asked[1]["check"], "shell", "checked before it is timed");
    assert_eq!(
        (&asked[2]["time"], &asked[2]["boundary"]),
        (&"shell".into(), &"layer from logits".into())
    );
    assert_eq!(asked.len(), 3, "a boundary that nobody asked for is left out");
    let inputs = std::fs::read_to_string(folder.path("inputs")).unwrap();
    assert!(inputs.contains("moe-kernels-peers-"), "{inputs}");
    assert!(!std::path::Path::new(inputs.trim()).exists(), "the tensors for peers are left behind");
}

#[test]
fn a_wrong_peer_is_not_timed() {
    let folder = Folder::new();
    let peer = peer(&folder, GOOD, r#"{"relative_error":0.5}"#, r#"{"seconds":[1]}"#);
    let (done, record) = beside(&folder, &peer);
    assert_eq!(done.status, Some(1), "{done:?}");
    let shell = rows(&record).last().unwrap();
    assert!(shell["seconds"].is_null(), "{shell}");
    assert!(shell["note"].as_str().unwrap().contains("wrong"), "{shell}");
}

#[test]
fn ours_is_held_against_the_truth_too() {
    for (ours, key, wanted) in [
        (r#"{"relative_error":0.5}"#, "relative_error", "0.5"),
        (r#"{"error":"it is not a number"}"#, "note", "it is not a number"),
    ] {
        let folder = Folder::new();
        let peer = peer(&folder, ours, GOOD, r#"{"seconds":[1]}"#);
        let (done, record) = beside(&folder, &peer);
        assert_eq!(done.status, Some(1), "{done:?}");
        let said = rows(&record)[0][key].to_string();
        assert!(said.contains(wanted), "{said}");
    }
}

#[test]
fn a_peer_that_fails_says_why() {
    let folder = Folder::new();
    let peer_that_cannot =
        peer(&folder, GOOD, r#"{"relative_error":0.0}"#, r#"{"error":"out of paper"}"#);
    let (done, record) = beside(&folder, &peer_that_cannot);
    assert_eq!(done.status, Some(0), "{done:?}");
    assert_eq!(rows(&record).last().unwrap()["note"], "out of paper");
    for (program, words) in [
        ("false", "ended before it answered"),
        ("no-such-program", "does not start"),
        ("echo hello", "answers 'hello --device"),
    ] {
        let (done, _) = beside(&folder, program);
        assert_eq!(done.status, Some(2), "{done:?}");
        assert!(done.stderr.contains(words), "no '{words}' in: {}", done.stderr);
    }
}
