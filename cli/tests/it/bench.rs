//! `bench`: its output, its files, and the protocol with peers.

use serde_json::Value;

use crate::common::{Done, Folder, program};

/// Runs `bench` on a small layer. Returns the output and bench.json.
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
fn cpu_run_prints_table_and_writes_record() {
    let folder = Folder::new();
    let more = ["--device", "cpu", "--tokens", "8,1", "--routing", "uniform,hot"];
    let (done, record) = bench(&folder, &more);
    assert_eq!(done.status, Some(0), "{done:?}");
    assert!(done.stdout.contains("measured ceilings: copy"), "{}", done.stdout);
    assert_eq!(record["complete"], true);
    assert_eq!(record["device"]["kind"], "cpu");
    assert!(record["ceilings"]["dense_flops_per_second"].as_f64().unwrap() > 0.0);
    // Fifteen operations, two numbers of tokens, two routings; layer_from_x has uniform routing
    // only.
    assert_eq!(rows(&record).len(), 58);
    for row in rows(&record) {
        let at = |key: &str| row["seconds"][key].as_f64().unwrap();
        assert!(0.0 < at("p10") && at("p10") <= at("median") && at("median") <= at("p90"), "{row}");
        let percent = row["percent_of_roofline"].as_f64().unwrap();
        let expected = 100.0 * row["roofline_seconds"].as_f64().unwrap() / at("median");
        assert!((percent / expected - 1.0).abs() < 1e-9, "{row}");
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
fn pictures_are_written_as_png_and_svg() {
    let folder = Folder::new();
    let (done, _) = bench(&folder, &["--device", "cpu", "--tokens", "1,8", "--op", "layer,route"]);
    assert_eq!(done.status, Some(0), "{done:?}");
    for name in ["time-olmoe-1b-7b-div64", "operations-olmoe-1b-7b-div64", "roofline"] {
        let png = std::fs::read(folder.path(&format!("out/{name}.png"))).unwrap();
        assert!(png.starts_with(b"\x89PNG") && png.len() > 10_000, "{name}: {} bytes", png.len());
        let svg = std::fs::read_to_string(folder.path(&format!("out/{name}.svg"))).unwrap();
        assert!(svg.contains("olmoe-1b-7b-div64"), "{name}.svg has no title");
    }
}

#[cfg(feature = "emulator")]
#[test]
fn emulator_run_counts_traffic_without_times() {
    let folder = Folder::new();
    let more = ["--device", "emulator", "--tokens", "8", "--op", "permute,layer", "--dtype", "f16"];
    let (done, record) = bench(&folder, &more);
    assert_eq!(done.status, Some(0), "{done:?}");
    assert!(done.stdout.contains("The software device is not timed"), "{}", done.stdout);
    let [permute, layer] = rows(&record) else { panic!("{record}") };
    assert!(permute["seconds"].is_null() && permute["percent_of_roofline"].is_null(), "{permute}");
    let kernels = permute["traffic"].as_array().unwrap();
    assert_eq!(kernels.len(), 1, "{permute}");
    assert_eq!(kernels[0]["kernel"], "moe_permute_fwd_f16");
    // 8 rows of 64 bytes are read and 64 written, in addition to the map.
    let moved = kernels[0]["dram_bytes"].as_u64().unwrap();
    assert!((72 * 64..72 * 64 + 1024).contains(&moved), "{moved}");
    assert!(layer["traffic"].as_array().unwrap().len() >= 5, "{layer}");
}

#[test]
fn time_limit_of_zero_measures_nothing() {
    let folder = Folder::new();
    let (done, record) = bench(&folder, &["--device", "cpu", "--tokens", "1", "--time-limit", "0"]);
    assert_eq!(done.status, Some(0), "{done:?}");
    assert!(done.stdout.contains("time limit was reached"), "{}", done.stdout);
    assert_eq!((record["complete"].as_bool(), rows(&record).len()), (Some(false), 0));
}

#[test]
fn invalid_options_are_errors_before_any_measurement() {
    let folder = Folder::new();
    for (arguments, words) in [
        (["--model", "gpt-5"], "wanted mixtral-8x7b,"),
        (["--op", "softmax"], "wanted router_gemm, route, noise,"),
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

/// The answer of a peer that accepts our output.
const GOOD: &str = r#"{"relative_error":1e-7}"#;

/// A peer in shell with fixed answers, which logs the requests.
fn peer(folder: &Folder, ours: &str, check: &str, time: &str) -> String {
    let script = format!(
        r#"
while [ $# -gt 0 ]; do last=$1; shift; done
[ -s "$last" ] && echo "$last" > {inputs}
echo '{{"peers":[{{"name":"shell","version":"1","boundaries":["layer from logits","GEMM alone"]}}],
"unavailable":[{{"name":"absent","why":"not installed"}}],"checks":["moe-kernels"]}}' | tr -d '\n'
echo
while read -r line; do
  echo "$line" >> {requests}
  case $line in
    *moe-kernels*) echo '{ours}' ;;
    *check*) echo '{check}' ;;
    *) echo '{time}' ;;
  esac
done
"#,
        requests = folder.path("requests").display(),
        inputs = folder.path("inputs").display(),
    );
    std::fs::write(folder.path("peer.sh"), script).unwrap();
    format!("sh {}", folder.path("peer.sh").display())
}

/// Runs `bench` on a layer with a program of peers.
fn bench_with(folder: &Folder, peer: &str) -> (Done, Value) {
    let layer = ["--device", "cpu", "--tokens", "2", "--op", "layer", "--no-ceilings"];
    bench(folder, &[&layer[..], &["--peers", peer]].concat())
}

#[test]
fn peers_are_checked_first_and_timed_between_ours() {
    let folder = Folder::new();
    let time = r#"{"seconds":[0.3,0.1,0.2],"launch":"eager","cache":"warm","note":null}"#;
    let peer = peer(&folder, GOOD, r#"{"relative_error":0.001}"#, time);
    let (done, record) = bench_with(&folder, &peer);
    assert_eq!(done.status, Some(0), "{done:?}");
    let [ours, absent, shell] = rows(&record) else { panic!("{record}") };
    assert_eq!(
        (ours["by"].as_str(), ours["relative_error"].as_f64()),
        (Some("moe-kernels"), Some(1e-7))
    );
    // Without ceilings there is no roofline.
    assert!(record["ceilings"]["copy_bytes_per_second"].is_null(), "{record}");
    assert!(ours["roofline_seconds"].is_null() && ours["seconds"]["median"].is_f64(), "{ours}");
    assert_eq!(
        (absent["by"].as_str(), absent["note"].as_str()),
        (Some("absent"), Some("not installed"))
    );
    assert_eq!(
        (shell["by"].as_str(), shell["seconds"]["median"].as_f64()),
        (Some("shell"), Some(0.2))
    );
    assert_eq!(shell["launch"], "eager");
    assert!(
        shell["ours_around"].as_array().unwrap().iter().all(|ours| ours.as_f64().unwrap() > 0.0)
    );
    let requests = std::fs::read_to_string(folder.path("requests")).unwrap();
    let requests: Vec<Value> =
        requests.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(requests[1]["check"], "shell", "a peer is checked before it is timed");
    assert_eq!(
        (&requests[2]["time"], &requests[2]["boundary"]),
        (&"shell".into(), &"layer from logits".into())
    );
    assert_eq!(requests.len(), 3, "only the requested boundary is timed");
    let inputs = std::fs::read_to_string(folder.path("inputs")).unwrap();
    let inputs = std::path::Path::new(inputs.trim());
    let parent = inputs.parent().unwrap();
    assert!(parent.to_string_lossy().contains("moe-kernels-peers-"), "{inputs:?}");
    assert!(!parent.exists(), "the folder of the tensors was not removed");
}

#[test]
fn peer_with_wrong_output_is_not_timed() {
    let folder = Folder::new();
    let peer = peer(&folder, GOOD, r#"{"relative_error":0.5}"#, r#"{"seconds":[1]}"#);
    let (done, record) = bench_with(&folder, &peer);
    assert_eq!(done.status, Some(1), "{done:?}");
    let shell = rows(&record).last().unwrap();
    assert!(shell["seconds"].is_null(), "{shell}");
    assert!(shell["note"].as_str().unwrap().contains("wrong"), "{shell}");
}

#[test]
fn wrong_output_of_ours_is_an_error() {
    for (ours, key, wanted) in [
        (r#"{"relative_error":0.5}"#, "relative_error", "0.5"),
        (r#"{"error":"it is not a number"}"#, "note", "it is not a number"),
    ] {
        let folder = Folder::new();
        let peer = peer(&folder, ours, GOOD, r#"{"seconds":[1]}"#);
        let (done, record) = bench_with(&folder, &peer);
        assert_eq!(done.status, Some(1), "{done:?}");
        let value = rows(&record)[0][key].to_string();
        assert!(value.contains(wanted), "{value}");
    }
}

#[test]
fn error_of_peer_is_reported() {
    let folder = Folder::new();
    let failing_peer =
        peer(&folder, GOOD, r#"{"relative_error":0.0}"#, r#"{"error":"out of memory"}"#);
    let (done, record) = bench_with(&folder, &failing_peer);
    assert_eq!(done.status, Some(0), "{done:?}");
    assert_eq!(rows(&record).last().unwrap()["note"], "out of memory");
    for (program, words) in [
        ("false", "ended before it answered"),
        ("no-such-program", "does not start"),
        ("echo hello", "answered 'hello --device"),
    ] {
        let (done, _) = bench_with(&folder, program);
        assert_eq!(done.status, Some(2), "{done:?}");
        assert!(done.stderr.contains(words), "no '{words}' in: {}", done.stderr);
    }
}
