//! The Kubernetes manifests in `configs/k8s`.

use serde_json::Value;

use super::support::*;

#[test]
fn the_manifests_say_what_an_indexed_job_needs() {
    for (file, indexed) in [("job.yaml", false), ("indexed-job.yaml", true)] {
        let text = std::fs::read_to_string(root().join("configs/k8s").join(file)).unwrap();
        let documents: Vec<Value> =
            serde_yaml::Deserializer::from_str(&text).map(|d| serde::Deserialize::deserialize(d).unwrap()).collect();
        let job = documents.iter().find(|d| d["kind"] == "Job").unwrap();
        assert_eq!(job["apiVersion"], "batch/v1");
        let pod = &job["spec"]["template"]["spec"];
        assert_eq!(pod["restartPolicy"], "OnFailure");
        let container = &pod["containers"][0];
        assert!(container["resources"]["requests"]["memory"].is_string());
        let args: Vec<&str> = container["args"].as_array().unwrap().iter().map(|a| a.as_str().unwrap()).collect();
        assert_eq!(args[0], "run");
        assert!(args.contains(&"--skip-existing"), "a pod that starts again does not do its work twice");
        // Every mount is one of the volumes; claims are declared here.
        let volumes: Vec<&Value> = pod["volumes"].as_array().unwrap().iter().collect();
        for mount in container["volumeMounts"].as_array().unwrap() {
            assert!(volumes.iter().any(|volume| volume["name"] == mount["name"]), "{mount}");
        }
        let claims: Vec<&Value> = documents.iter().filter(|d| d["kind"] == "PersistentVolumeClaim").collect();
        for volume in volumes.iter().filter(|v| v.get("persistentVolumeClaim").is_some()) {
            let name = &volume["persistentVolumeClaim"]["claimName"];
            assert!(claims.iter().any(|claim| claim["metadata"]["name"] == *name), "{name}");
        }
        // The recipe within the config map is one that is read, with as many jobs as the manifest has pods.
        let map = documents.iter().find(|d| d["kind"] == "ConfigMap").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let recipe = dir.path().join("recipe.yaml");
        std::fs::write(&recipe, map["data"]["recipe.yaml"].as_str().unwrap()).unwrap();
        let output = lite().arg("run").arg(&recipe).arg("--list").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let listed = output.stdout.iter().filter(|&&byte| byte == b'\n').count() as u64;
        if indexed {
            assert_eq!(job["spec"]["completionMode"], "Indexed");
            assert_eq!(job["spec"]["completions"].as_u64(), Some(listed));
            assert!(args.windows(2).any(|pair| pair == ["--only", "$(JOB_COMPLETION_INDEX)"]), "{args:?}");
        } else {
            assert_eq!(listed, 1);
        }
    }
}
