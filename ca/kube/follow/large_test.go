package follow_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/ca/kube/follow"
)

// names keeps what objects are called.
type names struct {
	all   []string
	whole func()
}

func (n *names) Begin()               { n.all = nil }
func (n *names) Put(o metav1.Object)  { n.all = append(n.all, o.GetName()) }
func (n *names) End()                 { n.whole() }
func (n *names) Delete(metav1.Object) {}

// TestLargeObjectsHideNobodys: sixty objects as large as an API server takes them, which one namespace can have, keep nobody from
// seeing the others, though a page of them is more than an answer may be.
func TestLargeObjectsHideNobodys(t *testing.T) {
	const objects = 700 // of which those from 300 on are large
	large := `"` + strings.Repeat("x", 1<<20) + `"`
	asked := 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if q.Get("watch") != "" {
			<-r.Context().Done()
			return
		}
		asked++
		limit, _ := strconv.Atoi(q.Get("limit"))
		from, _ := strconv.Atoi(q.Get("continue"))
		to := min(from+limit, objects)
		next := ""
		if to < objects {
			next = strconv.Itoa(to)
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"kind":"ThingList","apiVersion":"x/v1","metadata":{"resourceVersion":"7","continue":%q},"items":[`, next)
		for i := from; i < to; i++ {
			text, comma := `""`, ","
			if i >= 300 && i < 360 {
				text = large
			}
			if i == to-1 {
				comma = ""
			}
			fmt.Fprintf(w, `{"kind":"Thing","apiVersion":"x/v1","metadata":{"name":"t%d"},"spec":%s}%s`, i, text, comma)
		}
		fmt.Fprint(w, `]}`)
	}))
	defer srv.Close()
	defer srv.CloseClientConnections()
	file := filepath.Join(t.TempDir(), "kubeconfig")
	text := "apiVersion: v1\nkind: Config\ncurrent-context: x\ncontexts: [{name: x, context: {cluster: x, user: x}}]\nusers: [{name: x}]\nclusters: [{name: x, cluster: {server: \"" + srv.URL + "\"}}]\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := kube.Open("prod", file)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	n := &names{whole: cancel}
	api := c.Dynamic.Resource(schema.GroupVersionResource{Group: "x", Version: "v1", Resource: "things"})
	f := follow.New(follow.Config{Name: "things", Store: n, Log: slog.New(slog.DiscardHandler),
		List:  func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return api.List(ctx, o) },
		Watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) { return api.Watch(ctx, o) }})
	f.Run(ctx)
	if len(n.all) != objects {
		t.Fatalf("%d objects were seen, want %d: %v", len(n.all), objects, f.Status().Err)
	}
	for i, name := range n.all {
		if name != fmt.Sprint("t", i) {
			t.Fatalf("object %d is %s", i, name)
		}
	}
	if asked > 40 {
		t.Errorf("%d requests", asked)
	}
}
