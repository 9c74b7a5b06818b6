package kube

import (
	"context"
	"fmt"
	"net/http"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
)

// client-go's clientset has a client for every kind of Kubernetes, and any one of them links and registers the types of all
// of them. Here are those that the CA works with, and no others. [docs/decisions/0052]

// kinds are the types that the API server's answers are read into, by their group and version.
func kinds() map[schema.GroupVersion][]runtime.Object {
	return map[schema.GroupVersion][]runtime.Object{
		corev1.SchemeGroupVersion: {&corev1.Pod{}, &corev1.PodList{}, &corev1.Node{}, &corev1.NodeList{}, &corev1.ConfigMap{}, &corev1.ConfigMapList{},
			&corev1.Event{}, &corev1.EventList{}},
		coordinationv1.SchemeGroupVersion:          {&coordinationv1.Lease{}, &coordinationv1.LeaseList{}},
		discoveryv1.SchemeGroupVersion:             {&discoveryv1.EndpointSlice{}, &discoveryv1.EndpointSliceList{}},
		admissionregistrationv1.SchemeGroupVersion: {&admissionregistrationv1.MutatingWebhookConfiguration{}, &admissionregistrationv1.MutatingWebhookConfigurationList{}},
		certificatesv1beta1.SchemeGroupVersion:     {&certificatesv1beta1.PodCertificateRequest{}, &certificatesv1beta1.PodCertificateRequestList{}},
	}
}

// apis reaches the API groups of kinds.
type apis struct {
	parameters runtime.ParameterCodec
	groups     map[schema.GroupVersion]rest.Interface
}

func newAPIs(c *rest.Config, h *http.Client) (*apis, error) {
	scheme := runtime.NewScheme()
	known := kinds()
	for gv, types := range known {
		scheme.AddKnownTypes(gv, types...)
		metav1.AddToGroupVersion(scheme, gv) // what requests may hold, and errors and events are read into
	}
	codecs := serializer.NewCodecFactory(scheme).WithoutConversion()
	a := &apis{parameters: runtime.NewParameterCodec(scheme), groups: map[schema.GroupVersion]rest.Interface{}}
	for gv := range known {
		c := rest.CopyConfig(c)
		c.GroupVersion, c.APIPath = &gv, "/apis"
		if gv.Group == "" {
			c.APIPath = "/api"
		}
		c.NegotiatedSerializer = codecs
		// What protobuf has no words for is JSON.
		c.ContentType, c.AcceptContentTypes = runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON
		group, err := rest.RESTClientForConfigAndClient(c, h)
		if err != nil {
			return nil, fmt.Errorf("API %s: %w", gv, err)
		}
		a.groups[gv] = group
	}
	return a, nil
}

// Pods are those of a namespace; of all, if it is empty.
func (c *Client) Pods(namespace string) Resource[corev1.Pod, corev1.PodList] {
	return Resource[corev1.Pod, corev1.PodList]{c.apis, corev1.SchemeGroupVersion, "pods", namespace}
}

// Nodes are those of the cluster.
func (c *Client) Nodes() Resource[corev1.Node, corev1.NodeList] {
	return Resource[corev1.Node, corev1.NodeList]{c.apis, corev1.SchemeGroupVersion, "nodes", ""}
}

// ConfigMaps are those of a namespace; of all, if it is empty.
func (c *Client) ConfigMaps(namespace string) Resource[corev1.ConfigMap, corev1.ConfigMapList] {
	return Resource[corev1.ConfigMap, corev1.ConfigMapList]{c.apis, corev1.SchemeGroupVersion, "configmaps", namespace}
}

// Events are those of a namespace; of all, if it is empty.
func (c *Client) Events(namespace string) Resource[corev1.Event, corev1.EventList] {
	return Resource[corev1.Event, corev1.EventList]{c.apis, corev1.SchemeGroupVersion, "events", namespace}
}

// Leases are those of a namespace; of all, if it is empty.
func (c *Client) Leases(namespace string) Resource[coordinationv1.Lease, coordinationv1.LeaseList] {
	return Resource[coordinationv1.Lease, coordinationv1.LeaseList]{c.apis, coordinationv1.SchemeGroupVersion, "leases", namespace}
}

// EndpointSlices are those of a namespace; of all, if it is empty.
func (c *Client) EndpointSlices(namespace string) Resource[discoveryv1.EndpointSlice, discoveryv1.EndpointSliceList] {
	return Resource[discoveryv1.EndpointSlice, discoveryv1.EndpointSliceList]{c.apis, discoveryv1.SchemeGroupVersion, "endpointslices", namespace}
}

// MutatingWebhookConfigurations are those of the cluster.
func (c *Client) MutatingWebhookConfigurations() Resource[admissionregistrationv1.MutatingWebhookConfiguration, admissionregistrationv1.MutatingWebhookConfigurationList] {
	return Resource[admissionregistrationv1.MutatingWebhookConfiguration, admissionregistrationv1.MutatingWebhookConfigurationList]{
		c.apis, admissionregistrationv1.SchemeGroupVersion, "mutatingwebhookconfigurations", ""}
}

// PodCertificateRequests are those of a namespace; of all, if it is empty.
func (c *Client) PodCertificateRequests(namespace string) Resource[certificatesv1beta1.PodCertificateRequest, certificatesv1beta1.PodCertificateRequestList] {
	return Resource[certificatesv1beta1.PodCertificateRequest, certificatesv1beta1.PodCertificateRequestList]{
		c.apis, certificatesv1beta1.SchemeGroupVersion, "podcertificaterequests", namespace}
}

// Raw returns what the API server has at a path, as JSON.
func (c *Client) Raw(ctx context.Context, path string) ([]byte, error) {
	return c.apis.groups[corev1.SchemeGroupVersion].Get().AbsPath(path).SetHeader("Accept", runtime.ContentTypeJSON).Do(ctx).Raw()
}

// A Resource are the objects of one kind T, whose lists are L. Its methods are what those of client-go's typed clients are.
type Resource[T, L any] struct {
	apis      *apis
	group     schema.GroupVersion
	name      string
	namespace string
}

func (r Resource[T, L]) to(q *rest.Request, name string) *rest.Request {
	return q.NamespaceIfScoped(r.namespace, r.namespace != "").Resource(r.name).Name(name)
}

func (r Resource[T, L]) api() rest.Interface { return r.apis.groups[r.group] }

// one reads the answer to a request.
func (r Resource[T, L]) one(ctx context.Context, q *rest.Request) (*T, error) {
	out := new(T)
	err := q.Do(ctx).Into(object(out))
	if err != nil {
		return nil, err
	}
	return out, nil
}

// object is what kinds says of each of its types.
func object(x any) runtime.Object { return x.(runtime.Object) }

// Get returns the object of a name.
func (r Resource[T, L]) Get(ctx context.Context, name string, o metav1.GetOptions) (*T, error) {
	return r.one(ctx, r.to(r.api().Get(), name).VersionedParams(&o, r.apis.parameters))
}

// List returns the objects that there are.
func (r Resource[T, L]) List(ctx context.Context, o metav1.ListOptions) (*L, error) {
	out := new(L)
	err := r.api().Get().NamespaceIfScoped(r.namespace, r.namespace != "").Resource(r.name).VersionedParams(&o, r.apis.parameters).Do(ctx).Into(object(out))
	if err != nil {
		return nil, err
	}
	return out, nil
}

// Watch begins a watch, which ends with ctx at the latest.
func (r Resource[T, L]) Watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	o.Watch = true
	return r.api().Get().NamespaceIfScoped(r.namespace, r.namespace != "").Resource(r.name).VersionedParams(&o, r.apis.parameters).Watch(ctx)
}

// Create makes an object and returns it as the API server has it.
func (r Resource[T, L]) Create(ctx context.Context, x *T, o metav1.CreateOptions) (*T, error) {
	return r.one(ctx, r.api().Post().NamespaceIfScoped(r.namespace, r.namespace != "").Resource(r.name).VersionedParams(&o, r.apis.parameters).Body(object(x)))
}

// Update writes an object that is there.
func (r Resource[T, L]) Update(ctx context.Context, x *T, o metav1.UpdateOptions) (*T, error) {
	return r.one(ctx, r.to(r.api().Put(), object(x).(metav1.Object).GetName()).VersionedParams(&o, r.apis.parameters).Body(object(x)))
}

// UpdateStatus writes the status of an object that is there, and nothing else of it.
func (r Resource[T, L]) UpdateStatus(ctx context.Context, x *T, o metav1.UpdateOptions) (*T, error) {
	return r.one(ctx, r.to(r.api().Put(), object(x).(metav1.Object).GetName()).SubResource("status").VersionedParams(&o, r.apis.parameters).Body(object(x)))
}

// Patch changes an object by a patch of the given type.
func (r Resource[T, L]) Patch(ctx context.Context, name string, kind types.PatchType, patch []byte, o metav1.PatchOptions, subresources ...string) (*T, error) {
	return r.one(ctx, r.to(r.api().Patch(kind), name).SubResource(subresources...).VersionedParams(&o, r.apis.parameters).Body(patch))
}

// Delete deletes an object.
func (r Resource[T, L]) Delete(ctx context.Context, name string, o metav1.DeleteOptions) error {
	return r.to(r.api().Delete(), name).Body(&o).Do(ctx).Error()
}
