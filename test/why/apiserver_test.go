package why

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

type object = map[string]any

// An apiServer is one over real HTTPS, as far as a CA watches a cluster and reviews its agents' tokens. What it has does not
// change.
type apiServer struct {
	// pods, nodes and namespaces are what it has; secret are pods that a watch is not told of.
	pods, nodes, namespaces, secret []object
	// refuses is a kind of objects that it does not list.
	refuses string
	// tokens are those of agents: the name of the pod, which is in the namespace signet-system.
	tokens map[string]string
}

// start serves until the end of the test, and returns a kubeconfig.
func (a *apiServer) start(t *testing.T) string {
	t.Helper()
	s := httptest.NewTLSServer(a)
	t.Cleanup(func() {
		s.CloseClientConnections() // watches go on for as long as they are let
		s.Close()
	})
	authority := base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
	file := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: x
contexts: [{name: x, context: {cluster: x, user: x}}]
users: [{name: x, user: {token: a-token}}]
clusters: [{name: x, cluster: {server: %q, certificate-authority-data: %s}}]
`, s.URL, authority)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	w.Header().Set("Content-Type", "application/json")
	switch {
	case r.Method == http.MethodPost && parts[len(parts)-1] == "tokenreviews":
		a.review(w, r)
	case r.URL.Query().Get("watch") != "":
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	case len(parts) == 3, len(parts) == 5 && parts[2] == "namespaces": // /api/v1/KIND, /api/v1/namespaces/NS/pods
		a.list(w, r, parts[len(parts)-1])
	case len(parts) == 4, len(parts) == 6:
		a.get(w, parts)
	default:
		http.NotFound(w, r)
	}
}

func (a *apiServer) of(kind string) []object {
	return map[string][]object{"pods": a.pods, "nodes": a.nodes, "namespaces": a.namespaces}[kind]
}

func (a *apiServer) list(w http.ResponseWriter, r *http.Request, kind string) {
	if kind == a.refuses {
		http.Error(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Forbidden","code":403,"message":"`+kind+` is forbidden"}`, http.StatusForbidden)
		return
	}
	metadata := strings.Contains(r.Header.Get("Accept"), "PartialObjectMetadata")
	name, one := strings.CutPrefix(r.URL.Query().Get("fieldSelector"), "metadata.name=")
	all := a.of(kind)
	if one {
		all = append(all[:len(all):len(all)], a.secret...)
	}
	items := []object{}
	for _, o := range all {
		if one && o["metadata"].(object)["name"] != name {
			continue
		}
		if kind == "pods" && !one && (o["status"].(object)["phase"] == "Succeeded" || o["spec"].(object)["nodeName"] == "") {
			continue // as the watch's field selector asks
		}
		if metadata {
			o = object{"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": o["metadata"]}
		}
		items = append(items, o)
	}
	list := object{"kind": map[string]string{"pods": "PodList", "nodes": "NodeList", "namespaces": "NamespaceList"}[kind], "apiVersion": "v1", "metadata": object{"resourceVersion": "100"}, "items": items}
	if metadata {
		list["kind"], list["apiVersion"] = "PartialObjectMetadataList", "meta.k8s.io/v1"
	}
	json.NewEncoder(w).Encode(list)
}

func (a *apiServer) get(w http.ResponseWriter, parts []string) {
	for _, o := range a.of(parts[len(parts)-2]) {
		if o["metadata"].(object)["name"] == parts[len(parts)-1] {
			json.NewEncoder(w).Encode(o)
			return
		}
	}
	http.Error(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`, http.StatusNotFound)
}

func (a *apiServer) review(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Spec struct{ Token string }
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(&in); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	status := object{"authenticated": false}
	if name, known := a.tokens[in.Spec.Token]; known {
		for _, p := range a.pods {
			if m := p["metadata"].(object); m["name"] == name {
				status = object{"authenticated": true, "audiences": []string{"spire-server"}, "user": object{"username": "system:serviceaccount:signet-system:signet-agent", "extra": object{
					"authentication.kubernetes.io/pod-name": []string{name}, "authentication.kubernetes.io/pod-uid": []string{m["uid"].(string)}}}}
			}
		}
	}
	w.WriteHeader(http.StatusCreated)
	json.NewEncoder(w).Encode(object{"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "status": status})
}

// uuid is a UID made of a letter.
func uuid(c string) string {
	return strings.Repeat(c, 8) + "-" + strings.Repeat(c, 4) + "-4" + strings.Repeat(c, 3) + "-8" + strings.Repeat(c, 3) + "-" + strings.Repeat(c, 12)
}

const longAgo, now = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"

func aNode(name, uid string) object {
	return object{"kind": "Node", "apiVersion": "v1", "metadata": object{"name": name, "uid": uid, "creationTimestamp": longAgo, "resourceVersion": "1"}}
}

func aNamespace(name string) object {
	return object{"kind": "Namespace", "apiVersion": "v1", "metadata": object{"name": name, "uid": "ns-" + name, "resourceVersion": "1", "labels": object{"team": "blue"}}}
}

func aPod(namespace, name, uid, node string, change ...func(object)) object {
	o := object{"kind": "Pod", "apiVersion": "v1",
		"metadata": object{"name": name, "namespace": namespace, "uid": uid, "creationTimestamp": now, "resourceVersion": "1", "labels": object{"app": "web", "tier": "front"},
			"ownerReferences": []object{{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "web", "uid": "ss", "controller": true}}},
		"spec": object{"nodeName": node, "serviceAccountName": "web", "containers": []object{{"name": "server", "image": "docker.io/library/web:1.2"}}}, "status": object{"phase": "Running", "hostIP": "127.0.0.1"}}
	for _, f := range change {
		f(o)
	}
	return o
}
