package pods

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/template"
)

// An identity is a templated Identity as a rule. Two of one Entry are equal, so that only what changed is expanded anew.
type identity struct {
	e  *registry.Entry
	td spiffeid.TrustDomain
}

func (r identity) Name() string       { return registry.RuleName(r.e.Identity.Name) }
func (r identity) Created() time.Time { return r.e.CreatedAt }

func (r identity) Expand(p *Pod) ([]*registry.Entry, error) {
	e, err := r.e.Expand(r.td, &template.Pod{Cluster: p.Cluster, Node: p.NodeName, Namespace: p.Namespace, ServiceAccount: p.ServiceAccount, Name: p.Name,
		Labels: p.Labels, NamespaceLabels: p.NamespaceLabels, Owners: p.Owners})
	if e == nil {
		return nil, err
	}
	return []*registry.Entry{e}, nil
}

// takeIdentities makes rules of the templated Identities of the registry.
func (x *Expander) takeIdentities() {
	templates, rev := x.c.Registry.Templates()
	rules := make([]Rule, len(templates))
	for i, e := range templates {
		rules[i] = identity{e, x.c.Registry.TrustDomain()}
	}
	x.SetRules(OriginIdentities, rules)
	x.c.Registry.Expanded(rev)
}

// Run keeps the rules as the registry's templated Identities are, and reports pods whose ID is that of a registered entry,
// until ctx ends. While it runs, who changes an Identity waits until its pods have the entries.
func (x *Expander) Run(ctx context.Context) error {
	defer x.c.Registry.Expanded(0)
	for {
		x.takeIdentities()
		x.reportTaken()
		select {
		case <-x.c.Registry.TemplatedChanged():
		case <-x.c.Registry.TakenChanged():
		case <-ctx.Done():
			return nil
		}
	}
}
