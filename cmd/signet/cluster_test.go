package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
)

// serveCluster answers as the API server of a small cluster in which nothing changes, for the scripts of commands that show pods. What
// a real one does is in test/kube.
func serveCluster(dir string) (kubeconfig string, stop func(), err error) {
	type object = map[string]any
	const made = "2026-01-01T00:00:00Z"
	meta := func(ns, name, uid string) object {
		m := object{"name": name, "uid": uid, "creationTimestamp": made, "resourceVersion": "1"}
		if ns != "" {
			m["namespace"] = ns
		}
		return m
	}
	pod := func(ns, name, sa string) object {
		return object{"kind": "Pod", "apiVersion": "v1", "metadata": meta(ns, name, "uid-"+name), "spec": object{"nodeName": "worker-1", "serviceAccountName": sa, "containers": []object{{"name": "c", "image": "i"}}},
			"status": object{"phase": "Running", "conditions": []object{{"type": "PodScheduled", "status": "True", "lastTransitionTime": made}}}}
	}
	lists := map[string][]object{
		"pods":       {pod("bank", "accounts-1", "accounts"), pod("shop", "web-1", "web"), pod("shop", "web-2", "web")},
		"nodes":      {{"kind": "Node", "apiVersion": "v1", "metadata": meta("", "worker-1", "node-uid-1")}},
		"namespaces": {{"kind": "Namespace", "apiVersion": "v1", "metadata": meta("", "bank", "ns-1")}, {"kind": "Namespace", "apiVersion": "v1", "metadata": meta("", "shop", "ns-2")}},
	}
	kinds := map[string]string{"pods": "Pod", "nodes": "Node", "namespaces": "Namespace"}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		resource := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
		items, found := lists[resource]
		if !found || r.Method != http.MethodGet {
			http.Error(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`, http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Query().Get("watch") != "" {
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			return
		}
		kind, version := kinds[resource]+"List", "v1"
		if strings.Contains(r.Header.Get("Accept"), "PartialObjectMetadata") {
			kind, version = "PartialObjectMetadataList", "meta.k8s.io/v1"
			var shown []object
			for _, o := range items {
				shown = append(shown, object{"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": o["metadata"]})
			}
			items = shown
		}
		_ = json.NewEncoder(w).Encode(object{"kind": kind, "apiVersion": version, "metadata": object{"resourceVersion": "1"}, "items": items}) // who reads no more has gone
	}))
	stop = func() {
		srv.CloseClientConnections()
		srv.Close()
	}
	kubeconfig = filepath.Join(dir, "cluster.kubeconfig")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: x\ncontexts: [{name: x, context: {cluster: x, user: x}}]\nusers: [{name: x, user: {token: of-a-test}}]\nclusters: [{name: x, cluster: {server: %q}}]\n", srv.URL)
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		stop()
		return "", nil, err
	}
	return kubeconfig, stop, nil
}
