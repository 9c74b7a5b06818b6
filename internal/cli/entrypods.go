package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
)

// A podEntry is an entry that the CA holds for a pod, as it is printed.
type podEntry struct {
	ID            string   `json:"id"`
	SPIFFEID      string   `json:"spiffe_id"`
	Cluster       string   `json:"cluster"`
	Namespace     string   `json:"namespace"`
	Pod           string   `json:"pod"`
	PodUID        string   `json:"pod_uid"`
	Node          string   `json:"node"`
	Rule          string   `json:"rule"`
	ParentID      string   `json:"parent_id"`
	Selectors     []string `json:"selectors"`
	X509TTL       string   `json:"x509_ttl,omitempty"`
	JWTTTL        string   `json:"jwt_ttl,omitempty"`
	DNSNames      []string `json:"dns_names,omitempty"`
	FederatesWith []string `json:"federates_with,omitempty"`
	Hint          string   `json:"hint,omitempty"`
	ExpiresAt     string   `json:"expires_at,omitempty"`
	Revision      int64    `json:"revision"`
}

func podEntryOf(e *adminv1.PodEntry) podEntry {
	return podEntry{ID: e.GetId(), SPIFFEID: e.GetSpiffeId(), Cluster: e.GetCluster(), Namespace: e.GetNamespace(), Pod: e.GetPod(), PodUID: e.GetPodUid(), Node: e.GetNode(),
		Rule: e.GetRule(), ParentID: e.GetParentId(), Selectors: e.GetSelectors(), X509TTL: ttlString(int32(e.GetX509Ttl())), JWTTTL: ttlString(int32(e.GetJwtTtl())),
		DNSNames: e.GetDnsNames(), FederatesWith: e.GetFederatesWith(), Hint: e.GetHint(), ExpiresAt: stamp(unixTime(e.GetExpiresAt())), Revision: e.GetRevision()}
}

func (a *app) entryPodsCommand() *cobra.Command {
	req := &adminv1.ListPodEntriesRequest{}
	var hint string
	cmd := &cobra.Command{
		Use:   "pods",
		Short: "List the entries that the CA holds for pods",
		Long: `List the entries that the CA holds in memory for the pods of its clusters, by templated Identities and by the resources of
spire-controller-manager. They are as of one moment, and no other command lists them: they are not stored, and cannot be changed or deleted
one by one.`,
		Example: `  signet entry pods --namespace shop
  signet entry pods --identity cluster-default --node worker-1 -o json`,
	}
	output := outputFlag(cmd)
	fs := cmd.Flags()
	fs.StringVar(&req.SpiffeId, "spiffe-id", "", "only entries that give this ID")
	fs.StringArrayVar(&req.Selectors, "selector", nil, "only entries with these selectors, TYPE:VALUE (repeatable)")
	fs.StringArrayVar(&req.FederatesWith, "federates-with", nil, "only entries that federate with these trust domains (repeatable)")
	fs.StringVar(&hint, "hint", "", "only entries with this hint")
	fs.StringVar(&req.Cluster, "cluster", "", "only pods of this cluster")
	fs.StringVar(&req.Namespace, "namespace", "", "only pods of this namespace")
	fs.StringVar(&req.Pod, "pod", "", "only the pod of this name")
	fs.StringVar(&req.Node, "node", "", "only pods on this node")
	fs.StringVar(&req.Identity, "identity", "", "only what this templated Identity gives")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if cmd.Flags().Changed("hint") {
			req.Hint = &hint
		}
		if _, err := wireSelectors(req.Selectors); err != nil {
			return err
		}
		var err error
		if req.FederatesWith, err = trustDomains("--federates-with", req.FederatesWith); err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			if req.SpiffeId != "" {
				id, err := c.id(ctx, "--spiffe-id", req.SpiffeId)
				if err != nil {
					return err
				}
				req.SpiffeId = id.String()
			}
			return a.listPods(ctx, c, *output, req)
		})
	}
	return a.reachesCA(cmd)
}

func (a *app) listPods(ctx context.Context, c *caConn, f format, req *adminv1.ListPodEntriesRequest) error {
	const doing = "listing the entries of pods"
	l := &lister[podEntry]{app: a, format: f, none: "no pod has an entry that matches", columns: []column[podEntry]{
		{name: "POD", value: func(e podEntry) string { return e.Namespace + "/" + e.Pod }},
		{name: "SPIFFE ID", value: func(e podEntry) string { return e.SPIFFEID }},
		{name: "BY", value: func(e podEntry) string { return e.Rule }},
		{name: "CLUSTER", value: func(e podEntry) string { return e.Cluster }},
		{name: "NODE", value: func(e podEntry) string { return e.Node }},
		{name: "SELECTORS", wide: true, value: func(e podEntry) string { return strings.Join(e.Selectors, " ") }},
		{name: "HINT", wide: true, value: func(e podEntry) string { return e.Hint }},
		{name: "ENTRY ID", wide: true, value: func(e podEntry) string { return e.ID }},
	}}
	stream, err := adminv1.NewEntriesClient(c).ListPodEntries(ctx, req)
	if err != nil {
		return caError(doing, c, err)
	}
	var unknown []string
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return caError(doing, c, err)
		}
		unknown = append(unknown, part.GetUnknownClusters()...)
		items := make([]podEntry, len(part.GetEntries()))
		for i, e := range part.GetEntries() {
			items[i] = podEntryOf(e)
		}
		if err := l.add(items); err != nil {
			return err
		}
	}
	a.warnUnknown(unknown)
	return l.close()
}

// warnUnknown says of which clusters the CA does not know the pods.
func (a *app) warnUnknown(clusters []string) {
	for _, c := range clusters {
		a.warn([]string{fmt.Sprintf("the CA does not know now which pods the cluster %q has: its API server is away, or the CA has just started", c)})
	}
}
