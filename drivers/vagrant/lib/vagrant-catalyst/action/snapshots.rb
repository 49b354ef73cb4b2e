# frozen_string_literal: true

require "vagrant-catalyst/action/step"

module VagrantPlugins
  module Catalyst
    module Action
      # Keeps the VM as it is: disk, and where it runs or is suspended its memory.
      class SnapshotSave < Step
        def call(env)
          name = env[:snapshot_name]
          env[:ui].info(I18n.t("vagrant.actions.vm.snapshot.saving", name: name))
          env[:machine].provider.client.create_snapshot(env[:machine].id, name)
          env[:ui].success(I18n.t("vagrant.actions.vm.snapshot.saved", name: name))
          @app.call(env)
        end
      end

      # Makes the VM what it was; what it is now is lost.
      class SnapshotRestore < Step
        def call(env)
          name = env[:snapshot_name]
          env[:ui].info(I18n.t("vagrant.actions.vm.snapshot.restoring", name: name))
          start = env.fetch(:snapshot_start, true)
          env[:machine].provider.client.restore_snapshot(env[:machine].id, name, start)
          @app.call(env)
        end
      end

      # Deletes a snapshot.
      class SnapshotDelete < Step
        def call(env)
          name = env[:snapshot_name]
          env[:ui].info(I18n.t("vagrant.actions.vm.snapshot.deleting", name: name))
          env[:machine].provider.client.delete_snapshot(env[:machine].id, name)
          env[:ui].success(I18n.t("vagrant.actions.vm.snapshot.deleted", name: name))
          @app.call(env)
        end
      end
    end
  end
end
