# frozen_string_literal: true

require "digest"
require "vagrant"
require "vagrant/action/builtin/mixin_synced_folders"

require "vagrant-catalyst/errors"

module VagrantPlugins
  module Catalyst
    # Folders of the host that the daemon shares with a guest and its agent mounts.
    class SyncedFolder < Vagrant.plugin("2", :synced_folder)
      include Vagrant::Action::Builtin::MixinSyncedFolders

      # Guests of boxes have no agent: there, Vagrant takes another kind.
      def usable?(machine, _raise_error = false)
        machine.provider_name == :catalyst && !machine.provider.box_guest?
      end

      # The shortest path comes first, so that a folder within another is mounted in it.
      def enable(machine, folders, _options)
        machine.ui.output(I18n.t("vagrant.actions.vm.share_folders.mounting"))
        folders.sort_by { |_, data| data[:guestpath].to_s.length }.each do |id, data|
          tell(machine, data)
          share(machine, wanted(machine, id, data))
        end
      end

      def disable(machine, folders, _options)
        folders.each_key { |id| forget(machine, name_of(id)) }
      end

      # Takes away what an earlier Vagrantfile shared and this one does not. What others have shared stays.
      def forget_earlier(machine)
        earlier = names(synced_folders(machine, cached: true))
        gone = earlier - names(synced_folders(machine))
        gone.each { |name| forget(machine, name) }
      end

      # A folder's name for the daemon: `/vagrant` is `vagrant`. Ids that would become the same name do not.
      def name_of(id)
        bare = id.to_s.sub(%r{\A/+}, "")
        name = bare.gsub(/[^A-Za-z0-9._-]/, "_").gsub(/\A[^A-Za-z0-9]+|[^A-Za-z0-9]+\z/, "")[0, 48]
        return name if !name.empty? && name.tr("_", "/") == bare

        [name, Digest::SHA256.hexdigest(id.to_s)[0, 8]].reject(&:empty?).join("-")
      end

      private

      def tell(machine, data)
        key = data[:guestpath] ? "mounting_entry" : "nomount_entry"
        paths = { guestpath: data[:guestpath], hostpath: data[:hostpath] }
        machine.ui.detail(I18n.t("vagrant.actions.vm.share_folders.#{key}", **paths))
      end

      def names(folders)
        ours = folders.find { |kind, _| kind.to_sym == :catalyst }
        ours.nil? ? [] : ours.last.keys.map { |id| name_of(id) }
      end

      def share(machine, folder)
        client = machine.provider.client
        client.add_folder(machine.id, folder)
      rescue Errors::Api => error
        raise if error.code != "folder_exists"

        # The Vagrantfile says something else of it than it did.
        client.delete_folder(machine.id, folder[:name])
        client.add_folder(machine.id, folder)
      end

      def forget(machine, name)
        machine.provider.client.delete_folder(machine.id, name)
      rescue Errors::Api => error
        raise unless error.code.end_with?("not_found")
      end

      def wanted(machine, id, data)
        options = Array(data[:mount_options]).flat_map { |option| option.to_s.split(",") }
        named = options.grep(/=/).to_h { |option| option.split("=", 2) }
        unknown = options.reject { |option| option == "ro" || option == "rw" || option.match?(/\A[ug]id=/) }
        warn_of(machine, id, unknown) unless unknown.empty?
        {
          name: name_of(id), host_path: data[:hostpath].to_s, guest_path: data[:guestpath],
          read_only: options.include?("ro"),
          uid: user(machine, named["uid"] || data[:owner]),
          gid: group(machine, named["gid"] || data[:group])
        }.compact
      end

      def warn_of(machine, id, unknown)
        machine.ui.warn(I18n.t("vagrant_catalyst.folders.mount_options", id: id, options: unknown.join(", ")))
      end

      # The number of a user of the guest, who may be given by name.
      def user(machine, owner)
        owner && (number(owner) || ask(machine, owner, "id", "-u", "--").to_i)
      end

      # The number of a group of the guest: the third field of its line in group(5).
      def group(machine, owner)
        owner && (number(owner) || ask(machine, owner, "getent", "group").split(":")[2].to_i)
      end

      # @return [Integer, nil] nil if it is a name
      def number(owner)
        owner.to_i if owner.to_s.match?(/\A[0-9]+\z/)
      end

      def ask(machine, owner, *words)
        found = machine.provider.client.exec(machine.id, [*words, owner.to_s])
        raise Errors::NoSuchUser, name: owner if found["exit_code"] != 0

        found["stdout"]
      end
    end
  end
end
